"""Logic of the pilot system, for tasks, routers, dashboard and command line alike."""
