"""Ways to reach a site: local commands, SSH, and token files."""
