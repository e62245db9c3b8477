"""The first tables. Frozen: a change of the schema is a new revision that follows the newest one."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "submissions",
        sa.Column("submission_id", sa.String(255), primary_key=True),
        sa.Column("community", sa.String(200), nullable=False),
        sa.Column("comment_id", sa.String(255), nullable=False),
        sa.Column("author", sa.String(200)),
        sa.Column("text", sa.Text),
        sa.Column("text_sha256", sa.String(64), nullable=False),
        sa.Column("language", sa.String(35)),
        sa.Column("context", sa.JSON),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
    )
    op.create_index("ix_submissions_comment", "submissions", ["community", "comment_id"])
    op.create_table(
        "policies",
        sa.Column("policy_version", sa.String(64), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("first_used_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "decisions",
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("submissions.submission_id"), primary_key=True),
        sa.Column("toxic", sa.Double, nullable=False),
        sa.Column("severe_toxic", sa.Double, nullable=False),
        sa.Column("obscene", sa.Double, nullable=False),
        sa.Column("threat", sa.Double, nullable=False),
        sa.Column("insult", sa.Double, nullable=False),
        sa.Column("identity_hate", sa.Double, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("fired_label", sa.String(16)),
        sa.Column("fired_threshold", sa.Double),
        sa.Column("model_version", sa.String(100), nullable=False),
        sa.Column("policy_version", sa.String(64), sa.ForeignKey("policies.policy_version"), nullable=False),
        sa.Column("windows", sa.Integer, nullable=False),
        sa.Column("truncated", sa.Boolean, nullable=False),
        sa.Column("queue_ms", sa.Double, nullable=False),
        sa.Column("compute_ms", sa.Double, nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_decisions_decided_at", "decisions", ["decided_at"])
    op.create_index("ix_decisions_action", "decisions", ["action", "decided_at"])
    op.create_table(
        "reviews",
        sa.Column("review_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("submission_id", sa.String(255), sa.ForeignKey("decisions.submission_id"), nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("toxic", sa.Boolean),
        sa.Column("severe_toxic", sa.Boolean),
        sa.Column("obscene", sa.Boolean),
        sa.Column("threat", sa.Boolean),
        sa.Column("insult", sa.Boolean),
        sa.Column("identity_hate", sa.Boolean),
        sa.Column("reviewer", sa.String(200), nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("reviewed_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_reviews_submission", "reviews", ["submission_id"])
    op.create_table(
        "model_versions",
        sa.Column("version", sa.String(100), primary_key=True),
        sa.Column("parent", sa.String(100)),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "activations",
        sa.Column("activation_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("version", sa.String(100), sa.ForeignKey("model_versions.version"), nullable=False),
        sa.Column("activated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("activated_by", sa.String(200), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "version_loads",
        sa.Column("load_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("activation_id", sa.Integer, sa.ForeignKey("activations.activation_id"), nullable=False),
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("version", sa.String(100), nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("loaded_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_version_loads_activation", "version_loads", ["activation_id"])
    op.create_table(
        "training_runs",
        sa.Column("run_id", sa.String(36), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("requested_by", sa.String(200), nullable=False),
        sa.Column("overrides", sa.JSON, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("phase", sa.String(32)),
        sa.Column("step", sa.Integer),
        sa.Column("total_steps", sa.Integer),
        sa.Column("loss", sa.Double),
        sa.Column("seconds_left", sa.Double),
        sa.Column("parent", sa.String(100)),
        sa.Column("version", sa.String(100)),
        sa.Column("dataset_sha256", sa.String(64)),
        sa.Column("metrics", sa.JSON),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "dead_letters",
        sa.Column("dead_letter_id", sa.String(255), primary_key=True),
        sa.Column("queue", sa.String(200), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("payload_bytes", sa.Integer, nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_dead_letters_received_at", "dead_letters", ["received_at"])
    op.execute(
        """
        CREATE VIEW current_actions AS
        SELECT community, comment_id, submission_id, action, decided_by, model_action, model_version, decided_at
        FROM (
            SELECT s.community, s.comment_id, s.submission_id,
                   COALESCE(r.action, d.action) AS action,
                   CASE WHEN r.review_id IS NULL THEN 'model' ELSE r.reviewer END AS decided_by,
                   d.action AS model_action, d.model_version, d.decided_at,
                   ROW_NUMBER() OVER (PARTITION BY s.community, s.comment_id
                                      ORDER BY d.decided_at DESC, s.submission_id DESC) AS newest
            FROM decisions d
            JOIN submissions s ON s.submission_id = d.submission_id
            LEFT JOIN reviews r ON r.review_id = (
                SELECT MAX(review_id) FROM reviews WHERE submission_id = d.submission_id)
        ) AS ranked
        WHERE newest = 1
        """
    )


def downgrade() -> None:
    op.execute("DROP VIEW current_actions")
    for table in (
        "dead_letters",
        "training_runs",
        "version_loads",
        "activations",
        "model_versions",
        "reviews",
        "decisions",
        "policies",
        "submissions",
    ):
        op.drop_table(table)
