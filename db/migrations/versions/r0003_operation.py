"""The active policy, webhooks, and the order in which decisions are handed on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
oldest_compatible = "0002"
"""It only adds."""


def upgrade() -> None:
    op.create_table("schema_compatibility", sa.Column("oldest_revision", sa.String(32), primary_key=True))
    op.add_column("decisions", sa.Column("position", sa.BigInteger))
    op.create_index("ix_decisions_position", "decisions", ["position"], unique=True)
    op.create_table(
        "policy_activations",
        sa.Column("policy_activation_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("policy_version", sa.String(64), sa.ForeignKey("policies.policy_version"), nullable=False),
        sa.Column("activated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("activated_by", sa.String(200), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "webhook_cursors",
        sa.Column("endpoint", sa.String(100), primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("delivery_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("endpoint", sa.String(100), nullable=False),
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("decisions.submission_id"), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("endpoint", "submission_id"),
    )
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["state", "next_attempt_at"])


def downgrade() -> None:
    for table in ("webhook_deliveries", "webhook_cursors", "policy_activations", "schema_compatibility"):
        op.drop_table(table)
    op.drop_index("ix_decisions_position", "decisions")
    op.drop_column("decisions", "position")
