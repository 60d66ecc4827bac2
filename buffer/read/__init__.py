"""Reading a conversation: the unflushed tail and Postgres as one sequence."""
