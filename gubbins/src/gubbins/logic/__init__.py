"""What the pilot system does, for tasks, routers and the command line alike."""
