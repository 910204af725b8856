"""LoRAs of any program: read, checked against a model, added into its weights."""
