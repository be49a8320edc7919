"""Media size -> number of tokens, in whole numbers: the one answer to "how long is this?", from headers alone."""
