"""Settings: which layer wins, and what a mistake is told."""

from pathlib import Path

import pytest

from config.settings import ROOT, SettingsError, embedded_directory, load_settings, without_password


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def complaint(environment: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as raised:
        load_settings(environment)
    return str(raised.value)


class TestLayers:
    def test_the_defaults_alone_are_complete(self) -> None:
        # Given no file of the user's and an empty environment
        settings = load_settings({})
        # Then every setting has its default, and paths start at the repository
        assert settings.worker.device == "auto"
        assert settings.versions_dir == ROOT / "var" / "versions"
        assert settings.database_url == f"sqlite:///{ROOT}/var/moderato.db"

    def test_the_users_file_wins_over_the_defaults_key_by_key(self, file: Path) -> None:
        # Given a file that sets one key of a section
        file.write_text("worker:\n  threads: 3\n")
        settings = load_settings({"MODERATO_CONFIG": str(file)})
        # Then that key is the file's and its neighbours keep their defaults
        assert settings.worker.threads == 3
        assert settings.worker.window_tokens == load_settings({}).worker.window_tokens

    def test_the_environment_wins_over_the_users_file(self, file: Path) -> None:
        # Given a key set in the file and in the environment
        file.write_text("worker:\n  threads: 3\n  window_tokens: 5\n")
        settings = load_settings({"MODERATO_CONFIG": str(file), "MODERATO_WORKER__THREADS": "7"})
        # Then the environment's holds, and what only the file sets stays
        assert settings.worker.threads == 7
        assert settings.worker.window_tokens == 5

    def test_an_empty_file_changes_nothing(self, file: Path) -> None:
        file.write_text("# nothing yet\n")
        assert load_settings({"MODERATO_CONFIG": str(file)}) == load_settings({})

    def test_a_list_in_the_environment_is_written_as_in_yaml(self) -> None:
        settings = load_settings({"MODERATO_TRAINER__TRAIN_FILES": "[a.csv, /data/b.csv]"})
        assert settings.trainer.train_files == [str(ROOT / "a.csv"), "/data/b.csv"]

    def test_a_mapping_too_but_not_whatever_stands_in_braces(self) -> None:
        limits = {"MODERATO_CLIENT__COMMUNITY_MAX_COMMENTS_PER_MINUTE": '{"news": 5, Sport: 7}'}
        assert load_settings(limits).client.community_max_comments_per_minute == {"news": 5, "Sport": 7}
        prefix = {"MODERATO_BROKER_OPTIONS__GLOBAL_KEYPREFIX": "{moderato}:"}
        assert load_settings(prefix).broker_options.global_keyprefix == "{moderato}:"

    def test_variables_of_others_are_left_alone(self) -> None:
        others = {"PATH": "/bin", "MODERATOR": "x", "MODERATO_TEST_DATABASE_URL": "postgresql://db/x"}
        assert load_settings(others) == load_settings({})

    def test_what_kubernetes_says_of_its_services_is_left_alone(self) -> None:
        # Given the variables of Services named moderato and moderato-redis, with ports named http and file
        service_links = {
            "MODERATO_SERVICE_HOST": "10.96.12.7",
            "MODERATO_SERVICE_PORT": "80",
            "MODERATO_SERVICE_PORT_HTTP": "80",
            "MODERATO_SERVICE_PORT_FILE": "81",
            "MODERATO_PORT": "tcp://10.96.12.7:80",
            "MODERATO_REDIS_SERVICE_HOST": "10.96.12.8",
            "MODERATO_REDIS_PORT": "udp://10.96.12.8:6379",
            "MODERATO_REDIS_PORT_6379_TCP": "tcp://10.96.12.8:6379",
            "MODERATO_REDIS_PORT_6379_TCP_PROTO": "tcp",
            "MODERATO_REDIS_PORT_6379_TCP_PORT": "6379",
            "MODERATO_REDIS_PORT_6379_TCP_ADDR": "10.96.12.8",
        }
        assert load_settings(service_links) == load_settings({})
        # Then a setting that ends as they do is a setting still
        assert load_settings({"MODERATO_METRICS__WORKER_PORT": "7000"}).metrics.worker_port == 7000
        assert "metrics.worker_port" in complaint({"MODERATO_METRICS__WORKER_PORT": "tcp://10.96.12.7:80"})


class TestMistakes:
    def test_an_unknown_key_is_named_with_its_place_and_the_nearest(self, file: Path) -> None:
        file.write_text("worker:\n  thread: 3\n")
        said = complaint({"MODERATO_CONFIG": str(file)})
        assert said.startswith(f"unknown setting worker.thread in {file}; did you mean threads? allowed here: ")
        assert "max_batch_tokens" in said

    @pytest.mark.parametrize(
        ("variable", "value", "nearest"),
        [
            ("MODERATO_BROKER", "redis://localhost", "MODERATO_BROKER_URL"),
            ("MODERATO_METRICS__WORKR_PORT", "7000", "MODERATO_METRICS__WORKER_PORT"),
            ("MODERATO_PORT", "7000", None),
            ("MODERATO_SERVICE_HOSTS", "10.96.12.7", None),
        ],
    )
    def test_an_unknown_variable_is_named_with_the_nearest(
        self, variable: str, value: str, nearest: str | None
    ) -> None:
        said = complaint({variable: value})
        assert variable in said
        assert (f"did you mean {nearest}?" in said) == bool(nearest)

    def test_a_wrong_value_is_named_with_what_is_allowed(self, file: Path) -> None:
        file.write_text("worker:\n  device: tpu\n")
        said = complaint({"MODERATO_CONFIG": str(file)})
        assert said == (f"setting worker.device = 'tpu' in {file} is wrong: Input should be 'auto', 'cpu' or 'cuda'")

    def test_a_value_out_of_bounds_is_named_with_the_bound(self) -> None:
        said = complaint({"MODERATO_WORKER__VISIBILITY_TIMEOUT_S": "1"})
        assert said == (
            "setting worker.visibility_timeout_s = '1' in the variable MODERATO_WORKER__VISIBILITY_TIMEOUT_S is wrong: "
            "Input should be greater than or equal to 3"
        )

    def test_every_mistake_is_told_at_once(self) -> None:
        said = complaint({"MODERATO_WORKER__DEVICE": "tpu", "MODERATO_TRAINER__EPOCHS": "0"})
        assert "worker.device" in said
        assert "trainer.epochs" in said

    def test_a_value_where_a_section_belongs(self) -> None:
        assert "setting worker = 'fast'" in complaint({"MODERATO_WORKER": "fast"})
        both = {"MODERATO_WORKER": "fast", "MODERATO_WORKER__THREADS": "1"}
        assert complaint(both).startswith("MODERATO_WORKER__THREADS in the environment needs a section worker")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        said = complaint({"MODERATO_CONFIG": str(tmp_path / "absent.yaml")})
        assert said == f"settings file {tmp_path / 'absent.yaml'} cannot be read: No such file or directory"

    def test_a_file_that_is_not_a_mapping(self, file: Path) -> None:
        file.write_text("- worker\n")
        assert complaint({"MODERATO_CONFIG": str(file)}).endswith("must hold `key: value` lines, not a list")

    def test_a_list_in_the_environment_that_does_not_end(self) -> None:
        said = complaint({"MODERATO_TRAINER__TRAIN_FILES": "[a.csv"})
        assert said.startswith("MODERATO_TRAINER__TRAIN_FILES in the environment is no list or mapping as in YAML: ")


class TestEndpointsOfWebhooks:
    SECRET_VARIABLE = "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET"
    SECRET = "whsec_" + "eHh4" * 10
    MAPPING = "webhooks: {endpoints: {news: {url: 'https://a.example/hook', min_action: hide%s}}}\n"

    def test_the_secret_comes_from_the_environment(self, file: Path) -> None:
        # Given an endpoint in a file, and its secrets, the old and the new one, in the environment
        file.write_text(self.MAPPING % "")
        both = {"MODERATO_CONFIG": str(file), self.SECRET_VARIABLE: f"{self.SECRET} {self.SECRET}"}
        endpoint = load_settings(both).webhooks.endpoints["news"]
        assert endpoint.signing_keys == [b"xxx" * 10] * 2
        # Then they are not shown where the settings are
        assert "eHh4" not in repr(endpoint)

    def test_a_file_that_holds_one_is_refused_without_showing_it(self, file: Path) -> None:
        file.write_text(self.MAPPING % f", secret: {self.SECRET}")
        said = complaint({"MODERATO_CONFIG": str(file)})
        assert said.startswith(f"setting webhooks.endpoints.news.secret stands in {file}: a secret comes from the")
        assert "eHh4" not in said

    def test_no_mistake_shows_a_secret(self, file: Path) -> None:
        # Given a secret that is too short, and one of an endpoint that is not there
        file.write_text(self.MAPPING % "")
        said = complaint({"MODERATO_CONFIG": str(file), self.SECRET_VARIABLE: "whsec_eHh4"})
        assert f"webhooks.endpoints.news.secret = *** in the variable {self.SECRET_VARIABLE} is wrong: " in said
        assert "eHh4" not in said
        said = complaint({self.SECRET_VARIABLE: self.SECRET})
        assert "setting webhooks.endpoints.news.url is missing" in said
        assert "eHh4" not in said

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:8000/", "http://localhost/", "http://[::1]/", "https://a.example"]
    )
    def test_an_address(self, url: str) -> None:
        endpoint = f"{{news: {{url: '{url}', min_action: allow}}}}"
        assert load_settings({"MODERATO_WEBHOOKS__ENDPOINTS": endpoint}).webhooks.endpoints["news"].url == url

    @pytest.mark.parametrize(
        "url",
        [
            "http://a.example",
            "http://127.0.0.1.example",
            "ftp://a.example",
            "https://",
            "a",
            "https://a:b",
            "https://[a",
        ],
    )
    def test_an_address_that_is_refused(self, url: str) -> None:
        said = complaint({"MODERATO_WEBHOOKS__ENDPOINTS": f"{{news: {{url: '{url}', min_action: allow}}}}"})
        assert said.startswith(f"setting webhooks.endpoints.news.url = '{url}' in the variable ")

    def test_http_where_it_is_allowed(self) -> None:
        endpoint = "{news: {url: 'http://a.example', min_action: allow, allow_http: true}}"
        assert load_settings({"MODERATO_WEBHOOKS__ENDPOINTS": endpoint}).webhooks.endpoints["news"].allow_http

    def test_a_key_within_an_endpoint_that_is_unknown(self) -> None:
        said = complaint({"MODERATO_WEBHOOKS__ENDPOINTS": "{news: {url: 'https://a', min_actions: hide}}"})
        assert (
            "unknown setting webhooks.endpoints.news.min_actions in the variable MODERATO_WEBHOOKS__ENDPOINTS; "
            "did you mean min_action?" in said
        )


class TestUrls:
    def test_embedded_is_the_socket_in_the_private_folder(self) -> None:
        settings = load_settings({"MODERATO_BROKER_URL": "embedded"})
        assert settings.broker_url == f"redis+socket://{embedded_directory()}/redis.sock"

    def test_the_private_folder_leaves_room_for_a_sockets_path(self) -> None:
        assert len(str(embedded_directory() / "redis.sock")) < 107

    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost:6379/0",
            "rediss://user:secret@redis.example/1",
            "redis+socket:///run/redis.sock",
            "redis+socket://me:secret@/run/redis.sock?virtual_host=3",
            "sentinel://a.example:26379;sentinel://b.example:26379",
            "redis://me:p%2Fa%23s%3Fs%5B%25@[::1]:6379/15",
            "redis://:p@ss@localhost",
            "redis://",
            "rediss://a.example?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem",
        ],
    )
    def test_every_form_of_broker_is_taken_as_it_is(self, url: str) -> None:
        assert load_settings({"MODERATO_BROKER_URL": url}).broker_url == url

    @pytest.mark.parametrize("url", ["amqp://localhost", "localhost:6379", ""])
    def test_another_broker_is_refused(self, url: str) -> None:
        assert "expected embedded, or a URL beginning with redis://" in complaint({"MODERATO_BROKER_URL": url})

    @pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
    def test_postgresql_gets_its_driver_and_keeps_its_password(self, scheme: str) -> None:
        settings = load_settings({"MODERATO_DATABASE_URL": f"{scheme}://user:p%40ss@db.example/moderato"})
        assert settings.database_url == "postgresql+psycopg://user:p%40ss@db.example/moderato"

    def test_sqlite_outside_the_repository_stays_where_it_is(self, tmp_path: Path) -> None:
        settings = load_settings({"MODERATO_DATABASE_URL": f"sqlite:///{tmp_path}/x.db"})
        assert settings.database_url == f"sqlite:///{tmp_path}/x.db"

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
    def test_a_database_in_memory_is_refused(self, url: str) -> None:
        assert "SQLite needs a file" in complaint({"MODERATO_DATABASE_URL": url})

    @pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite+aiosqlite:///x.db", "moderato.db"])
    def test_another_database_is_refused(self, url: str) -> None:
        assert "expected a URL" in complaint({"MODERATO_DATABASE_URL": url})

    def test_what_is_prepared_is_a_number_or_none(self) -> None:
        for threshold in ("none", "7"):
            load_settings({"MODERATO_DATABASE_URL": f"postgresql://db/x?prepare_threshold={threshold}"})
        said = complaint({"MODERATO_DATABASE_URL": "postgresql://me:secret@db/x?prepare_threshold=never"})
        assert said.endswith("is wrong: prepare_threshold is none, or a number of executions")


class TestPasswords:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost/0", "redis://localhost/0"),
            ("redis://:secret@localhost/0", "redis://:***@localhost/0"),
            ("rediss://me:sec@ret@localhost", "rediss://me:***@localhost"),
            ("sentinel://:secret@a:1;sentinel://:secret@b:1", "sentinel://:***@a:1;sentinel://:***@b:1"),
            ("postgresql+psycopg://me:sec;ret@db/x", "postgresql+psycopg://me:***@db/x"),
            (
                "postgresql://db/x?user=me&password=secret&sslmode=require",
                "postgresql://db/x?user=me&password=***&sslmode=require",
            ),
            ("sqlite:////var/moderato.db", "sqlite:////var/moderato.db"),
        ],
    )
    def test_a_url_is_shown_without_its_password(self, url: str, shown: str) -> None:
        assert without_password(url) == shown

    @pytest.mark.parametrize(
        "variable, url",
        [
            ("MODERATO_BROKER_URL", "amqp://me:secret@localhost"),
            ("MODERATO_BROKER_URL", "amqp://:secret@a;amqp://:secret@b"),
            ("MODERATO_DATABASE_URL", "mysql://me:secret@localhost/x"),
            ("MODERATO_DATABASE_URL", "postgresql://me:secret@localhost:port/x"),
            ("MODERATO_DATABASE_URL", "mysql://localhost/x?password=secret"),
        ],
    )
    def test_a_wrong_url_is_told_without_its_password(self, variable: str, url: str) -> None:
        said = complaint({variable: url})
        assert "secret" not in said
        assert "***" in said

    @pytest.mark.parametrize(
        ("setting", "url"),
        [
            *(
                ("BROKER_URL", url)
                for url in (
                    "redis://:S3c/R3t@h:6379/0",
                    "redis://:S3c#R3t@h:6379/0",
                    "redis://:S3c?R3t@h:6379/0",
                    "redis://:S3c[R3t@h:6379/0",
                    "redis://:S3c;R3t@h:6379/0",
                    "redis://:S3c\u2100R3t@h:6379/0",  # NFKC makes a/c of it
                    "redis://:S3c@R3t/S3c@h:6379/0",
                    "redis://:12345/R3t@h:6379/0",
                    "redis://:12345#R3t@h:6379/0",
                    "redis://:12345?R3t@h:6379/0",
                    "redis+socket://:S3c#R3t@/run/redis.sock",
                    "redis+socket://R3t/run/redis.sock",
                    "sentinel://:S3c@a:26379;sentinel://:S3c/R3t@b:26379",
                    "rediss://:S3c@h/0?ssl_cert_reqs=bogus",
                    "redis://:S3c@h/0?bogus=1",
                    "redis://:S3c@h:port/0",
                    "redis://:S3c@h:99999/0",
                    "redis://:S3c@h:6379/mydb",
                    "redis://:S3c@h:6379/0/",
                    "S3cR3t",
                )
            ),
            *(
                ("DATABASE_URL", url)
                for url in (
                    "postgresql://me:S3c@R3t@h/x",
                    "postgresql://me:S3c@h/x?R3t@h/x",
                    "postgresql://R3t:S3c:R3t/S3c",
                    "postgresql://me:S3c@h:port/x",
                    "S3cR3t",
                )
            ),
        ],
    )
    @pytest.mark.parametrize("is_file", [False, True])
    def test_a_url_that_cannot_be_read_is_told_in_a_line_that_shows_nothing_of_it(
        self, setting: str, url: str, is_file: bool, tmp_path: Path
    ) -> None:
        variable = f"MODERATO_{setting}"
        if is_file:
            secret = tmp_path / "secret"
            secret.write_text(url)
            said = complaint({f"{variable}_FILE": str(secret)})
        else:
            said = complaint({variable: url})
        assert variable in said
        assert "\n" not in said
        assert not [part for part in ("S3c", "R3t", "12345", "port/", "mydb") if part in said]

    def test_settings_are_represented_without_their_urls(self) -> None:
        urls = {
            "MODERATO_BROKER_URL": "redis://:secret@h/0",
            "MODERATO_DATABASE_URL": "postgres://me:secret@h/x",
            "MODERATO_BROKER_OPTIONS__SENTINEL_PASSWORD": "secret",
        }
        assert "secret" not in repr(load_settings(urls)).replace("secret=", "")

    def test_a_line_that_is_not_yaml_is_not_quoted(self, file: Path) -> None:
        # Given a file with a password in the very line that YAML cannot read
        file.write_text("worker: {}\nbroker_url: redis://:secret@localhost: 6379\n")
        # Then the complaint says where, and not what stands there
        said = complaint({"MODERATO_CONFIG": str(file)})
        assert f"settings file {file} is not YAML" in said
        assert "line 2" in said
        assert "secret" not in said

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("#" * 1_048_577, "cannot be read: it has 1,048,577 bytes; at most 1,048,576 are read"),
            ("[" * 100_000, "is not YAML: maximum recursion depth"),
            ("worker: {threads: 2026-13-45}", "is not YAML: month must be in 1..12"),
        ],
        ids=["length", "depth", "no-such-date"],
    )
    def test_a_file_that_is_none_of_ours(self, file: Path, text: str, said: str) -> None:
        file.write_text(text)
        assert f"settings file {file} {said}" in complaint({"MODERATO_CONFIG": str(file)})


class TestSecretFiles:
    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        return tmp_path / "secret"

    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_a_setting_may_stand_in_a_file_of_its_own(self, secret: Path, end: str) -> None:
        # Given a password in a file, with a space that belongs to it
        secret.write_bytes(b"redis://worker:pa ss @queue.example/0" + end.encode())
        # Then it is the setting, without the end of the line, and wins over a file of settings
        settings = load_settings({"MODERATO_BROKER_URL_FILE": str(secret)})
        assert settings.broker_url == "redis://worker:pa ss @queue.example/0"

    def test_so_may_a_section_s_and_it_wins_over_a_file_of_settings(self, secret: Path, file: Path) -> None:
        secret.write_text("5\n")
        file.write_text("client: {max_queue_messages: 7}\n")
        environment = {"MODERATO_CONFIG": str(file), "MODERATO_CLIENT__MAX_QUEUE_MESSAGES_FILE": str(secret)}
        assert load_settings(environment).client.max_queue_messages == 5

    def test_a_setting_that_is_a_file_s_name_is_left_as_it_is(self, secret: Path) -> None:
        environment = {"MODERATO_POLICY_FILE": str(secret), "MODERATO_TRAINER__HOLDOUT_FILE": str(secret)}
        settings = load_settings(environment)
        assert (settings.policy_file, settings.trainer.holdout_file) == (secret, secret)

    @pytest.mark.parametrize(
        "content, said",
        [
            (None, "cannot be read: No such file or directory"),
            (b"", "is empty"),
            (b"\n", "is empty"),
            (b"redis://\xff", "is not UTF-8 text"),
            (b"x" * 65_537, "cannot be read: it has 65,537 bytes; at most 65,536 are read"),
        ],
    )
    def test_a_file_that_cannot_be_it_is_named_with_its_variable(
        self, secret: Path, content: bytes | None, said: str
    ) -> None:
        if content is not None:
            secret.write_bytes(content)
        told = complaint({"MODERATO_BROKER_URL_FILE": str(secret)})
        assert told.startswith(f"the file {secret}, which MODERATO_BROKER_URL_FILE names, {said}")

    def test_the_same_setting_twice_is_refused(self, secret: Path) -> None:
        environment = {"MODERATO_BROKER_URL": "redis://a", "MODERATO_BROKER_URL_FILE": str(secret)}
        assert "MODERATO_BROKER_URL and MODERATO_BROKER_URL_FILE are both set" in complaint(environment)

    def test_a_variable_that_names_no_file_is_refused(self) -> None:
        said = complaint({"MODERATO_BROKER_URL_FILE": ""})
        assert said.startswith("MODERATO_BROKER_URL_FILE is set in the environment and names no file")

    @pytest.mark.parametrize("variable", ["MODERATO_BROKER_URL_FILE", "MODERATO_BROKERS_FILE", "MODERATO_X__Y_FILE"])
    def test_what_it_holds_is_told_to_nobody(self, secret: Path, variable: str) -> None:
        secret.write_text("a-password-alone\n")
        said = complaint({variable: str(secret)})
        assert "a-password-alone" not in said
        assert f"in the secret file {secret}" in said
