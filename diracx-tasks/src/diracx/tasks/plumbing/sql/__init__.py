"""SQL databases: sessions and transactions, portable column types, classified errors."""
