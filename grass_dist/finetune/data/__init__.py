"""From the files of a user to micro-batches: reading, chat templates, tokens, identity of a stream."""
