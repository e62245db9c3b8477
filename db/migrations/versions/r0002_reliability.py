"""Durable submissions, dead letters that can be found by author, trials of versions, erasures."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PENDING = sa.text("state = 'pending'")
NEW_COLUMNS: dict[str, dict[str, Any]] = {
    "submissions": {
        "queue": sa.String(200),
        "expires_at": sa.DateTime(timezone=True),
        "enqueued_at": sa.DateTime(timezone=True),
        "erased_at": sa.DateTime(timezone=True),
    },
    "dead_letters": {
        "payload_sha256": sa.String(64),
        "text_sha256": sa.String(64),
        "community": sa.String(200),
        "comment_id": sa.String(255),
        "author": sa.String(200),
    },
}


def upgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind))
    op.create_index(
        "ix_submissions_pending",
        "submissions",
        ["queue", "enqueued_at"],
        postgresql_where=PENDING,
        sqlite_where=PENDING,
    )
    op.create_table(
        "trials",
        sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("version", sa.String(100), sa.ForeignKey("model_versions.version"), nullable=False),
        sa.Column("baseline", sa.String(100), nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("bounds", sa.JSON, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_by", sa.String(200), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("ended_by", sa.String(200)),
        sa.Column("verdict", sa.Text),
    )
    op.create_table(
        "trial_scores",
        sa.Column("trial_id", sa.Integer, sa.ForeignKey("trials.trial_id"), primary_key=True),
        sa.Column("submission_id", sa.String(255), primary_key=True),
        sa.Column("toxic", sa.Double),
        sa.Column("severe_toxic", sa.Double),
        sa.Column("obscene", sa.Double),
        sa.Column("threat", sa.Double),
        sa.Column("insult", sa.Double),
        sa.Column("identity_hate", sa.Double),
        sa.Column("action", sa.String(16)),
        sa.Column("error", sa.Text),
        sa.Column("scored_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "erasures",
        sa.Column("erasure_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("community", sa.String(200)),
        sa.Column("until", sa.DateTime(timezone=True)),
        sa.Column("submissions", sa.Integer, nullable=False),
        sa.Column("dead_letters", sa.Integer, nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("erased_by", sa.String(200), nullable=False),
        sa.Column("reason", sa.Text),
    )


def downgrade() -> None:
    for table in ("erasures", "trial_scores", "trials"):
        op.drop_table(table)
    op.drop_index("ix_submissions_pending", "submissions")
    # A submission without a decision would be one that the older release never looks at.
    op.execute("DELETE FROM submissions WHERE state <> 'decided'")
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
