"""From a file to rows: JSON, CSV, Parquet, SQLite."""
