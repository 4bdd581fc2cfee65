"""Sign-in, sessions, access policies and the checks made on every request of the dashboard."""
