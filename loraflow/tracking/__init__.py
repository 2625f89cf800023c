"""Mirror runs and the promotion log to MLflow. The store stays the truth: MLflow is a view of it."""
