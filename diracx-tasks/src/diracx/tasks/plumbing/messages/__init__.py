"""What a task and its result look like as bytes: arguments, codec, secrets and errors in text."""
