"""The active policy, webhooks, and the order in which decisions are handed on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
oldest_compatible = "0002"
"""It only adds."""

GRANT_SEQUENCE_TO_WRITERS = """
DO $$
DECLARE
    writer text;
BEGIN
    FOR writer IN
        SELECT DISTINCT rolname
        FROM pg_class, aclexplode(relacl) AS granted JOIN pg_roles ON pg_roles.oid = granted.grantee
        WHERE pg_class.oid = 'decisions'::regclass AND granted.privilege_type = 'INSERT'
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE decisions_position_seq TO %I', writer);
    END LOOP;
END $$
"""


def upgrade() -> None:
    op.create_table("schema_compatibility", sa.Column("oldest_revision", sa.String(32), primary_key=True))
    # Without a default, which would write every row of a large table anew; those keep a null, and the feed begins with
    # what is decided from now on. The default comes after it and counts for new rows, those of older workers too.
    op.add_column("decisions", sa.Column("position", sa.BigInteger))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE SEQUENCE decisions_position_seq OWNED BY decisions.position")
        # Before anybody draws from it: who may write decisions can do so at once, and not only after roles.sql.
        op.execute(GRANT_SEQUENCE_TO_WRITERS)
        op.execute("ALTER TABLE decisions ALTER COLUMN position SET DEFAULT nextval('decisions_position_seq')")
    # Its index reads the whole table, so `db.migrate` builds it beside the workers.
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
        sa.Column("endpoint", sa.String(100), primary_key=True),
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("decisions.submission_id"), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
    )
    pending = sa.text("state = 'pending'")
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["endpoint", "next_attempt_at"],
        postgresql_where=pending,
        sqlite_where=pending,
    )
    op.create_index("ix_webhook_deliveries_finished", "webhook_deliveries", ["finished_at"])


def downgrade() -> None:
    for table in ("webhook_deliveries", "webhook_cursors", "policy_activations", "schema_compatibility"):
        op.drop_table(table)
    op.drop_index("ix_decisions_position", "decisions", if_exists=True)
    op.drop_column("decisions", "position")
