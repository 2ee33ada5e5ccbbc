"""Makes micro-batches of the files of a user: reading, chat templates, tokens, identity of a stream."""
