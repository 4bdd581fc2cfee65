"""What commands run on: broker, databases, configuration, registry, logging, metrics server, supervisor."""
