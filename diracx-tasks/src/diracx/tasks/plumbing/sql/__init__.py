"""SQL databases: sessions, transactions, portable column types, errors, migrations."""
