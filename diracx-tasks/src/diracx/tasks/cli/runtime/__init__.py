"""Resources of commands: broker, databases, configuration, registry, logging, metrics server, supervisor."""
