"""`make gpu`: what only a GPU can show, in parts that each run in a process of their own."""
