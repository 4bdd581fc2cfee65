"""Sign-in, sessions, access policies and request checks of the dashboard."""
