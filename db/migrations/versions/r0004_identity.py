"""Ids that belong to a community, dead letters that keep their place in time, and the newest submission's action."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
oldest_compatible = "0002"
"""It only adds. Rows of older releases keep their ids."""

NEW_COLUMNS: dict[str, dict[str, Any]] = {
    "submissions": {"name": sa.String(200)},
    "dead_letters": {"name": sa.String(200), "submitted_at": sa.DateTime(timezone=True)},
}
CURRENT_ACTIONS = """
    SELECT community, comment_id, submission_id, action, decided_by, model_action, model_version, decided_at
    FROM (
        SELECT s.community, s.comment_id, s.submission_id,
               COALESCE(r.action, d.action) AS action,
               CASE WHEN r.review_id IS NULL THEN 'model' ELSE r.reviewer END AS decided_by,
               d.action AS model_action, d.model_version, d.decided_at,
               ROW_NUMBER() OVER (PARTITION BY s.community, s.comment_id
                                  ORDER BY {newest_first}) AS newest
        FROM decisions d
        JOIN submissions s ON s.submission_id = d.submission_id
        LEFT JOIN reviews r ON r.review_id = (
            SELECT MAX(review_id) FROM reviews WHERE submission_id = d.submission_id)
    ) AS ranked
    WHERE newest = 1
"""


def upgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind))
    _replace_view("s.submitted_at DESC, d.decided_at DESC, s.submission_id DESC")


def downgrade() -> None:
    op.drop_index("ix_submissions_dead", "submissions", if_exists=True)
    _replace_view("d.decided_at DESC, s.submission_id DESC")
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)


def _replace_view(newest_first: str) -> None:
    view = f"VIEW current_actions AS {CURRENT_ACTIONS.format(newest_first=newest_first)}"
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"CREATE OR REPLACE {view}")  # keeps who may read it
    else:
        op.execute("DROP VIEW current_actions")
        op.execute(f"CREATE {view}")
