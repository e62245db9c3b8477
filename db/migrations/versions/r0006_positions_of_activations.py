"""Where in the order of decisions an activation or a trial stands, so that no two clocks are compared."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
oldest_compatible = "0002"
"""It only adds. Rows of older releases have no positions and are placed by their times."""

NEW_COLUMNS = {
    "activations": ("after_position",),
    "policy_activations": ("after_position",),
    "trials": ("after_position", "until_position"),
}


def upgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.add_column(table, sa.Column(name, sa.BigInteger))


def downgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
