"""What runs on machines: `ray up` files against Ray's own code, image, Slurm, Prometheus."""

import ast
import copy
import ipaddress
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from test_docs import parse_command
from test_manifests import CLUSTER, ROOT, documents, misspelt

RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))

# -- ray up --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_schema():
    import ray.autoscaler

    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.name)
def test_ray_up_files_fit_rays_schema_and_a_typo_is_caught(path, ray_schema):
    [config] = documents(path)
    jsonschema.validate(config, ray_schema)
    validator = jsonschema.Draft7Validator(ray_schema)
    keys = [(key,) for key in config] + [("auth", key) for key in config["auth"]]
    keys += [("docker", key) for key in config["docker"]]
    keys += [
        ("available_node_types", name, key)
        for name, node in config["available_node_types"].items()
        for key in node
    ]
    for key in keys:
        assert not validator.is_valid(misspelt(config, key)), key
    assert not validator.is_valid({**config, "provider": {"region": "x"}})


@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.name)
def test_ray_up_clusters_use_spot_gpus_a_token_and_no_public_dashboard(path):
    [config] = documents(path)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    gpu = types["gpu_spot"]["node_config"]
    assert "spot" in json.dumps(gpu).lower()
    assert gpu != types["head"]["node_config"] and types["gpu_spot"]["min_workers"] == 0
    [head] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    [worker] = [c for c in config["worker_start_ray_commands"] if "ray start" in c]
    for command in (head, worker):
        assert command.startswith("RAY_AUTH_MODE=token ray start ")
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in path.read_text()
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def _resolved(path):
    """The config as `ray up` runs it: Ray's defaults filled in, setup commands merged."""
    from ray.autoscaler._private.util import prepare_config

    [config] = documents(path)
    return prepare_config(copy.deepcopy(config))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.name)
def test_ray_up_installs_nothing_on_the_nodes(path):
    config = _resolved(path)
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []
    registry = config["docker"]["image"].partition("/")[0]
    [login] = config["initialization_commands"]
    assert registry in login


@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.name)
def test_ray_starts_a_cpu_node_for_work_that_needs_no_gpu(path):
    from ray.autoscaler._private import resource_demand_scheduler as scheduler

    config = _resolved(path)
    summary = scheduler.NodeAvailabilitySummary(node_availabilities={})

    def started(demand):
        nodes, unmet = scheduler.get_nodes_for(
            config["available_node_types"],
            {config["head_node_type"]: 1},
            config["head_node_type"],
            config["max_workers"],
            demand,
            partial(scheduler._default_utilization_scorer, node_availability_summary=summary),
        )
        assert not unmet
        return dict(nodes)

    cpus = config["available_node_types"]["cpu_spot"]["resources"]["CPU"]
    assert started([{"CPU": 1}] * cpus) == {"cpu_spot": 1}
    assert started([{"CPU": 1, "GPU": 1}] * 8) == {"gpu_spot": 8}
    # CPU nodes that are still up leave room for every GPU.
    types = config["available_node_types"].values()
    assert config["max_workers"] == sum(node["max_workers"] for node in types)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda p: p.name)
def test_workers_are_spot_nodes(path):
    for name, node in _resolved(path)["available_node_types"].items():
        assert ("spot" in json.dumps(node["node_config"]).lower()) is (name != "head")


def test_nodes_on_aws_have_an_encrypted_disk_imdsv2_and_an_image_of_ours():
    for node in _resolved(CLUSTER / "ray-up/aws.yaml")["available_node_types"].values():
        node_config = node["node_config"]
        [disk] = node_config["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"] is True
        # Two hops: the container is one behind the node.
        assert node_config["MetadataOptions"] == {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 2,
        }
        assert node_config["ImageId"].startswith("ami-")


def test_ray_makes_no_security_group_on_aws(monkeypatch):
    from ray.autoscaler._private.aws import config as aws

    # What it would put into a group of its own, extra rules of the provider or not.
    rules = json.dumps(aws._create_default_inbound_rules(["sg-1"], [{"FromPort": 443}]))
    assert "0.0.0.0/0" in rules
    monkeypatch.setattr(aws, "_upsert_security_groups", lambda *_: pytest.fail("made a group"))
    config = aws._configure_security_group(_resolved(CLUSTER / "ray-up/aws.yaml"))
    groups = [
        node["node_config"]["SecurityGroupIds"] for node in config["available_node_types"].values()
    ]
    assert len(groups) == 3 and groups == [groups[0]] * 3 and len(groups[0]) == 1
    guide = (ROOT / "docs/cluster.md").read_text()
    [cidr] = re.findall(r"--cidr (\S+)", guide)
    assert ipaddress.ip_network(cidr).prefixlen > 16


# -- image, script, monitoring -------------------------------------------------------------------


def _linter(name):
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_image_is_pinned_and_runs_as_nobody_special():
    text = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"pip install.*", text):
        assert "-c constraints.txt" in line
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "1000:1000"
    assert ":latest" not in text
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", text, re.M):
        for name in source.split():
            ignored = (CLUSTER / "Dockerfile.dockerignore").read_text()
            assert f"!{name.removeprefix('./')}" in ignored


def test_the_image_brings_what_ray_up_runs_and_imports():
    import ray.autoscaler._private as autoscaler

    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    [system] = re.findall(r"apt-get install (.*?) &&", text)
    # Ray copies into the container with rsync; the head's autoscaler reaches workers by ssh.
    assert {"rsync", "openssh-client"} <= set(system.split())
    distributions = {
        "boto3": "boto3",
        "botocore": "boto3",
        "google": "google-auth",
        "google_auth_httplib2": "google-auth-httplib2",
        "googleapiclient": "google-api-python-client",
        "httplib2": "httplib2",
    }
    of_ray = {"ray", "packaging"}
    imported = set()
    for provider in ("aws", "gcp"):
        for file in (Path(autoscaler.__file__).parent / provider).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.partition(".")[0])
    imported -= of_ray | sys.stdlib_module_names
    assert imported == set(distributions)
    [step] = re.findall(r"pip install -c constraints.txt (boto3 .*)", text)
    assert set(step.split()) == set(distributions.values())
    constraints = (ROOT / "constraints.txt").read_text()
    for name in step.split():
        assert re.search(rf"^{name}==", constraints, re.M), f"{name} is not pinned"


def test_a_login_shell_in_the_image_finds_its_commands(tmp_path):
    from ray.autoscaler._private.command_runner import _with_interactive

    assert _with_interactive("ray stop")[:2] == ["bash", "--login"]
    text = (CLUSTER / "Dockerfile").read_text()
    # Debian's /etc/profile reads the files of this folder that end in .sh.
    [command] = re.findall(r"^RUN (printf .*) > /etc/profile\.d/\w+\.sh$", text, re.M)
    snippet = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    home = tmp_path / "opt/refscale/bin"
    home.mkdir(parents=True)
    names = ["ray", "python", "refscale"]
    for name in names:
        (home / name).write_text("")
        (home / name).chmod(0o755)
    profile = tmp_path / "refscale.sh"
    profile.write_text(snippet.stdout.replace("/opt/", f"{tmp_path}/opt/"))
    login = "/usr/local/bin:/usr/bin:/bin"  # what Debian's /etc/profile leaves of PATH
    done = subprocess.run(
        ["bash", "-c", f". {profile}; command -v {' '.join(names)} ls"],
        env={"PATH": login},
        capture_output=True,
        text=True,
    )
    *ours, system = done.stdout.split()
    assert ours == [str(home / name) for name in names] and system.endswith("/ls")


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [_linter("hadolint"), str(CLUSTER / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing():
    scripts = [str(path) for path in CLUSTER.rglob("*.sbatch")]
    done = subprocess.run([_linter("shellcheck"), *scripts], capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stdout


def test_the_slurm_script_parses_and_asks_for_its_arguments():
    script = CLUSTER / "slurm/refscale.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "CONFIG RUN_DIR" in done.stderr
    [command] = re.findall(r"^\s*refscale (.*)$", script.read_text(), re.M)
    parse_command(command)


def test_prometheus_scrapes_the_file_that_ray_writes():
    from ray._private import ray_constants

    [config] = documents(CLUSTER / "monitoring/prometheus.yml")
    [job] = config["scrape_configs"]
    [discovery] = job["file_sd_configs"]
    name = ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert discovery["files"] == [f"/tmp/ray/{name}"]
