-- Roles with the least rights that each part of moderato works with. Run it as a superuser, connected to moderato's
-- database, before the first `moderato db upgrade` and again after each later one:
--
--   createdb moderato
--   psql -v ON_ERROR_STOP=1 -d moderato -f deploy/postgresql/roles.sql
--   psql -d moderato -c '\password moderato_owner'      -- and so on, for each role that logs in
--   MODERATO_DATABASE_URL=postgresql://moderato_owner@db.example/moderato moderato db upgrade
--   psql -v ON_ERROR_STOP=1 -d moderato -f deploy/postgresql/roles.sql
--
-- moderato_owner     owns the tables: migrations, and `moderato erase` (VACUUM is the owner's)
-- moderato_worker    workers: writes decisions, dead letters, trials; erases what has grown old
-- moderato_trainer   the trainer: reads reviewed texts, writes versions and activations
-- moderato_client    producers' and moderators' ModerationClient and commands, but for erasing and purging
-- moderato_webhooks  `moderato webhooks run`: reads decisions, reviews and erasures, and texts for endpoints that are to
--                    have them; writes its outbox
-- moderato_reader    dashboards and reports: reads everything, but comments' texts and dead letters' payloads
--
-- Advisory locks need no right of their own. Nobody but the owner may change a table, or delete a row, but for
-- moderato_webhooks what it has delivered.

DO $$
DECLARE role text;
BEGIN
    FOREACH role IN ARRAY ARRAY['owner', 'worker', 'trainer', 'client', 'webhooks', 'reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'moderato_' || role) THEN
            EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE', 'moderato_' || role);
        END IF;
    END LOOP;
    EXECUTE format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format(
        'GRANT CONNECT ON DATABASE %I TO moderato_owner, moderato_worker, moderato_trainer, moderato_client, '
        'moderato_webhooks, moderato_reader',
        current_database());
END $$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO moderato_owner;
GRANT USAGE ON SCHEMA public
    TO moderato_worker, moderato_trainer, moderato_client, moderato_webhooks, moderato_reader;

-- Before the first upgrade there is nothing to grant on.
DO $$
DECLARE
    grant_ record;
BEGIN
    IF to_regclass('public.submissions') IS NULL THEN
        RETURN;
    END IF;
    REVOKE ALL ON ALL TABLES IN SCHEMA public
        FROM moderato_worker, moderato_trainer, moderato_client, moderato_webhooks, moderato_reader;
    REVOKE ALL ON ALL SEQUENCES IN SCHEMA public
        FROM moderato_worker, moderato_trainer, moderato_client, moderato_webhooks, moderato_reader;

    GRANT SELECT ON alembic_version, schema_compatibility
        TO moderato_worker, moderato_trainer, moderato_client, moderato_webhooks, moderato_reader;

    GRANT SELECT, INSERT, UPDATE ON submissions, dead_letters, trials TO moderato_worker;
    GRANT SELECT, INSERT ON decisions, policies, model_versions, activations, version_loads, trial_scores, erasures
        TO moderato_worker;
    GRANT SELECT ON reviews, policy_activations TO moderato_worker;

    GRANT SELECT, INSERT, UPDATE ON training_runs TO moderato_trainer;
    GRANT SELECT, INSERT ON model_versions, activations TO moderato_trainer;
    GRANT SELECT ON submissions, decisions, reviews, version_loads TO moderato_trainer;
    GRANT SELECT, UPDATE ON trials TO moderato_trainer;

    GRANT SELECT ON ALL TABLES IN SCHEMA public TO moderato_client;
    GRANT INSERT ON submissions, reviews, training_runs, model_versions, activations, trials, policies, policy_activations
        TO moderato_client;
    GRANT UPDATE ON training_runs, trials, webhook_deliveries, webhook_event_deliveries TO moderato_client;

    GRANT SELECT ON decisions, reviews, erased_submissions TO moderato_webhooks;
    GRANT SELECT (submission_id, comment_id, community, submitted_at, text) ON submissions TO moderato_webhooks;
    GRANT SELECT, INSERT, UPDATE ON webhook_cursors, webhook_deliveries, webhook_event_deliveries TO moderato_webhooks;
    GRANT DELETE ON webhook_deliveries, webhook_event_deliveries TO moderato_webhooks;

    FOR grant_ IN
        SELECT quote_ident(table_name) AS name, string_agg(quote_ident(column_name::text), ', ') AS columns
        FROM information_schema.columns
        WHERE table_schema = 'public'
          AND NOT (table_name = 'submissions' AND column_name IN ('text', 'context', 'author'))
          AND NOT (table_name = 'dead_letters' AND column_name IN ('payload', 'author'))
        GROUP BY table_name
    LOOP
        EXECUTE format('GRANT SELECT (%s) ON %s TO moderato_reader', grant_.columns, grant_.name);
    END LOOP;

    GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO moderato_worker, moderato_trainer, moderato_client;
END $$;
