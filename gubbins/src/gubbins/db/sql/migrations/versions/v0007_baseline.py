"""Create the tables of the pilot database.

No released version has other tables than those of the models. The next revision, which changes the models, needs
the tables of the version before: it writes them out here (Alembic's `autogenerate` for an empty database does).
"""

from alembic import op

from gubbins.db.sql.schema import MyPilotDBBase

revision = "0007"
down_revision = None


def upgrade() -> None:
    MyPilotDBBase.metadata.create_all(op.get_bind())


def downgrade() -> None:
    MyPilotDBBase.metadata.drop_all(op.get_bind())
