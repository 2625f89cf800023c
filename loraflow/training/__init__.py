"""Train an adapter: trl's SFTTrainer over our shards, in an order that is a pure function of seed and epoch."""
