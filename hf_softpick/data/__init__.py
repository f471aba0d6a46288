"""From text to packed rows: sources, tokenizing, packing, preparing, collating. Importing it imports nothing heavy."""
