"""Reviews and erasures in the feed, with positions from the same order as decisions, and their deliveries."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
oldest_compatible = "0002"
"""It only adds."""

GRANT_SEQUENCE_TO_REVIEWERS = """
DO $$
DECLARE
    writer text;
BEGIN
    FOR writer IN
        SELECT DISTINCT rolname
        FROM pg_class, aclexplode(relacl) AS granted JOIN pg_roles ON pg_roles.oid = granted.grantee
        WHERE pg_class.oid = 'reviews'::regclass AND granted.privilege_type = 'INSERT'
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE decisions_position_seq TO %I', writer);
    END LOOP;
END $$
"""

# On SQLite the writer of decisions counts: the highest position of `decisions` and one more. Writers of the release
# before do not know that reviews and erasures have positions too, and would give those again, below the cursor of a
# reader. So a trigger moves such a decision behind them. It runs in the writer's transaction, under the only lock.
OTHERS = """MAX(
    COALESCE((SELECT MAX(position) FROM reviews WHERE position IS NOT NULL), 0),
    COALESCE((SELECT MAX(position) FROM erased_submissions), 0))"""
NEXT = f"1 + MAX(COALESCE((SELECT MAX(position) FROM decisions WHERE position IS NOT NULL), 0), {OTHERS})"  # noqa: S608
TRIGGERS = {
    "decisions": f"NEW.position <= {OTHERS}",
    "reviews": "NEW.position IS NULL",
    "erased_submissions": "NEW.position IS NULL",
}
"""By table: when a new row's position is to be set."""


def upgrade() -> None:
    pending = sa.text("state = 'pending'")
    positioned = sa.text("position IS NOT NULL")
    op.create_table(
        "erased_submissions",
        sa.Column("erased_submission_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("submissions.submission_id"), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("position", sa.BigInteger),
    )
    op.create_index("ix_erased_submissions_position", "erased_submissions", ["position"], unique=True)
    op.create_table(
        "webhook_event_deliveries",
        sa.Column("endpoint", sa.String(100), primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("submissions.submission_id"), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
    )
    for name, columns in (
        ("due", ["endpoint", "next_attempt_at"]),
        ("pending", ["endpoint", "submission_id", "position"]),
    ):
        op.create_index(
            f"ix_webhook_event_deliveries_{name}",
            "webhook_event_deliveries",
            columns,
            postgresql_where=pending,
            sqlite_where=pending,
        )
    op.create_index("ix_webhook_event_deliveries_finished", "webhook_event_deliveries", ["finished_at"])
    # No review has a position yet, so an endpoint hears of all that come from now on; also one that a sender of the
    # release before begins later, by the default.
    op.add_column("webhook_cursors", sa.Column("events_position", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE webhook_cursors SET events_position = position")
    # Without a default, as that of decisions: older reviews are no part of the feed. The default comes after it and
    # counts for new rows, those of older clients too.
    op.add_column("reviews", sa.Column("position", sa.BigInteger))
    op.create_index(
        "ix_reviews_position",
        "reviews",
        ["position"],
        unique=True,
        postgresql_where=positioned,
        sqlite_where=positioned,
    )
    if op.get_bind().dialect.name == "postgresql":
        # Before anybody draws from it: who may write reviews can do so at once, and not only after roles.sql.
        op.execute(GRANT_SEQUENCE_TO_REVIEWERS)
        for table in "reviews", "erased_submissions":
            op.execute(f"ALTER TABLE {table} ALTER COLUMN position SET DEFAULT nextval('decisions_position_seq')")
    else:
        for table, condition in TRIGGERS.items():
            op.execute(
                f"CREATE TRIGGER {table}_position AFTER INSERT ON {table} WHEN {condition} "  # noqa: S608
                f"BEGIN UPDATE {table} SET position = {NEXT} WHERE rowid = NEW.rowid; END"
            )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for table in TRIGGERS:
            op.execute(f"DROP TRIGGER {table}_position")
    for table in "webhook_event_deliveries", "erased_submissions":
        op.drop_table(table)
    op.drop_column("webhook_cursors", "events_position")
    op.drop_index("ix_reviews_position", "reviews")
    op.drop_column("reviews", "position")
