"""Inner loops of `dictionary.sparse` on a GPU, in Triton; elsewhere plain torch does them."""
