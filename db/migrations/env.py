"""How Alembic reaches the database: through the connection, and in the transaction, that `db.migrate` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
