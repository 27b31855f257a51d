"""What quantizing does column by column: the definition in plain torch, and on a GPU."""
