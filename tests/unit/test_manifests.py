"""The manifests of cluster/: strict schemas, and what a security reviewer asks of them.

KubeRay's own schema is large and, as published, lets misspelt fields pass. Here is the part of it
that our manifests use, closed: a field that is not in it is an error. `ray up` files are checked
against the schema in Ray's wheel.
"""

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
import yaml
from test_docs import parse_command

from refscale.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"

# -- schemas -------------------------------------------------------------------------------------

STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
BOOLEAN = {"type": "boolean"}
MAP = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def obj(required="", **properties):
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required.split(),
    }


def arr(items):
    return {"type": "array", "items": items, "minItems": 1}


METADATA = obj("name labels", name=NAME, labels=MAP, annotations=MAP)
AMOUNTS = obj(
    "cpu memory ephemeral-storage",
    cpu=QUANTITY,
    memory=QUANTITY,
    **{"ephemeral-storage": QUANTITY, "nvidia.com/gpu": QUANTITY},
)
RESOURCES = obj("requests limits", requests=AMOUNTS, limits=AMOUNTS)
POD_SECURITY = obj(
    "runAsNonRoot runAsUser seccompProfile",
    runAsNonRoot={"const": True},
    runAsUser={"type": "integer", "minimum": 1},
    runAsGroup={"type": "integer", "minimum": 1},
    fsGroup={"type": "integer", "minimum": 1},
    seccompProfile=obj("type", type={"const": "RuntimeDefault"}),
)
SECURITY = obj(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities=obj("drop", drop={"const": ["ALL"]}),
)
CONTAINER = obj(
    "name image securityContext resources",
    name=NAME,
    image={"type": "string", "pattern": r"^[^:]+:(?!latest$)[\w.-]+$"},
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ports=arr(obj("name containerPort", name=NAME, containerPort=COUNT)),
    env=arr(obj("name value", name=STRING, value=STRING)),
    envFrom=arr(obj("secretRef", secretRef=obj("name", name=NAME, optional=BOOLEAN))),
    securityContext=SECURITY,
    resources=RESOURCES,
    volumeMounts=arr(obj("name mountPath", name=NAME, mountPath=STRING, readOnly=BOOLEAN)),
)
VOLUME = obj(
    "name",
    name=NAME,
    configMap=obj("name", name=NAME),
    persistentVolumeClaim=obj("claimName", claimName=NAME),
)
POD = obj(
    "metadata spec",
    metadata=obj("labels", labels=MAP),
    spec=obj(
        "serviceAccountName automountServiceAccountToken securityContext containers",
        serviceAccountName=NAME,
        automountServiceAccountToken=BOOLEAN,
        restartPolicy={"enum": ["Never", "OnFailure"]},
        securityContext=POD_SECURITY,
        containers=arr(CONTAINER),
        volumes=arr(VOLUME),
        tolerations=arr(
            obj(
                "key operator",
                key=STRING,
                operator={"enum": ["Exists", "Equal"]},
                effect={"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]},
            )
        ),
    ),
)
RAY_CLUSTER = obj(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=STRING,
    authOptions=obj("mode", mode={"const": "token"}),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=obj(
        "version resources securityContext",
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=RESOURCES,
        securityContext=SECURITY,
    ),
    headGroupSpec=obj(
        "rayStartParams template",
        rayStartParams=obj("num-cpus", **{"num-cpus": {"const": "0"}}),
        template=POD,
    ),
    workerGroupSpecs=arr(
        obj(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=MAP,
            template=POD,
        )
    ),
)
RAY_JOB = obj(
    "entrypoint submissionMode shutdownAfterJobFinishes rayClusterSpec submitterPodTemplate",
    entrypoint=STRING,
    entrypointNumCpus=COUNT,
    entrypointNumGpus=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=COUNT,
    submitterPodTemplate=POD,
    rayClusterSpec=RAY_CLUSTER,
)
# An empty selector, or one by a label that anybody may set, would let any namespace in.
NAMESPACE = obj(
    "matchLabels",
    matchLabels=obj("kubernetes.io/metadata.name", **{"kubernetes.io/metadata.name": NAME}),
)
PEERS = arr(
    obj(
        "podSelector",
        podSelector=obj("matchLabels", matchLabels={**MAP, "minProperties": 1}),
        namespaceSelector=NAMESPACE,
    )
)
NETWORK_POLICY = obj(
    "podSelector policyTypes ingress",
    podSelector=obj("matchLabels", matchLabels=MAP),
    policyTypes={"const": ["Ingress"]},
    ingress=arr(
        obj("from", ports=arr(obj("port protocol", port=COUNT, protocol=STRING)), **{"from": PEERS})
    ),
)
CLAIM = obj(
    "accessModes resources",
    accessModes=arr({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
    resources=obj("requests", requests=obj("storage", storage=QUANTITY)),
)
POD_MONITOR = obj(
    "selector podMetricsEndpoints",
    selector=obj("matchLabels", matchLabels=MAP),
    podMetricsEndpoints=arr(obj("port interval", port=NAME, interval=STRING)),
)


def kind(version, **spec):
    return obj(
        " ".join(["apiVersion kind metadata", *spec]),
        apiVersion={"const": version},
        kind=STRING,
        metadata=METADATA,
        **spec,
    )


KINDS = {
    "RayJob": kind("ray.io/v1", spec=RAY_JOB),
    "RayCluster": kind("ray.io/v1", spec=RAY_CLUSTER),
    "ServiceAccount": kind("v1", automountServiceAccountToken={"const": False}),
    "ConfigMap": kind("v1", data=MAP),
    "PersistentVolumeClaim": kind("v1", spec=CLAIM),
    "NetworkPolicy": kind("networking.k8s.io/v1", spec=NETWORK_POLICY),
    "PodMonitor": kind("monitoring.coreos.com/v1", spec=POD_MONITOR),
}
# Maps whose keys are ours to choose.
FREE = {"labels", "matchLabels", "annotations", "data"}

KUBERNETES = [*sorted((CLUSTER / "kuberay").glob("*.yaml")), CLUSTER / "monitoring/podmonitor.yaml"]
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))


def documents(path):
    return [doc for doc in yaml.safe_load_all(path.read_text()) if doc]


def validate(document):
    jsonschema.validate(document, KINDS[document["kind"]])


def paths_of_keys(node, prefix=()):
    """Paths of all mapping keys, those of free maps left out."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*prefix, key)
            if key not in FREE:
                yield from paths_of_keys(value, (*prefix, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from paths_of_keys(value, (*prefix, i))


def misspelt(document, path):
    """A copy in which the key at `path` has two letters swapped, or one doubled."""
    document = copy.deepcopy(document)
    node = document
    for part in path[:-1]:
        node = node[part]
    key = path[-1]
    swapped = key[:-2] + key[-1] + key[-2]
    node[swapped if swapped != key else key + key[-1]] = node.pop(key)
    return document


# -- Kubernetes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_kubernetes_manifests_fit_the_strict_schema(path):
    found = documents(path)
    assert found
    for document in found:
        validate(document)


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_a_typo_in_any_key_of_a_kubernetes_manifest_is_caught(path):
    for document in documents(path):
        schema = KINDS[document["kind"]]
        keys = list(paths_of_keys(document))
        assert len(keys) > 4
        validator = jsonschema.Draft202012Validator(schema)
        for key in keys:
            if key == ("kind",):
                continue  # it picks the schema
            # In resources and start parameters a misspelt key would start a node without it.
            assert not validator.is_valid(misspelt(document, key)) or key[-2] == "rayStartParams", (
                key
            )


def ray_clusters():
    for path in KUBERNETES:
        for document in documents(path):
            if document["kind"] == "RayJob":
                yield pytest.param(document["spec"]["rayClusterSpec"], id=path.name)
            elif document["kind"] == "RayCluster":
                yield pytest.param(document["spec"], id=path.name)


def _pods(cluster):
    return [cluster["headGroupSpec"]["template"]] + [
        group["template"] for group in cluster["workerGroupSpecs"]
    ]


@pytest.mark.parametrize("cluster", ray_clusters())
def test_pods_are_inside_the_network_policy_and_know_each_other_by_name(cluster):
    [policy] = [
        d for d in documents(CLUSTER / "kuberay/common.yaml") if d["kind"] != "ServiceAccount"
    ]
    for pod in _pods(cluster):
        assert (
            policy["spec"]["podSelector"]["matchLabels"].items()
            <= pod["metadata"]["labels"].items()
        )
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
            # Ray sizes its object store by the limit, and a request below it invites eviction.
            assert container["resources"]["limits"] == container["resources"]["requests"]
            names = [entry["name"] for entry in container.get("env", [])]
            assert not [name for name in names if re.search("TOKEN|SECRET|KEY|PASSW", name)]


def test_only_a_head_with_an_autoscaler_holds_a_token_of_the_api_server():
    found = 0
    for path in KUBERNETES:
        for document in documents(path):
            if document["kind"] not in ("RayJob", "RayCluster"):
                continue
            spec = document["spec"]
            cluster = spec.get("rayClusterSpec", spec)
            head, *others = _pods(cluster)
            if "submitterPodTemplate" in spec:
                others.append(spec["submitterPodTemplate"])
            assert head["spec"]["automountServiceAccountToken"] is bool(
                cluster.get("enableInTreeAutoscaling", False)
            )
            for pod in others:
                assert pod["spec"]["automountServiceAccountToken"] is False
            found += 1
    assert found == 3


def test_the_policy_names_the_namespace_that_the_operator_is_installed_into():
    [policy] = [
        d for d in documents(CLUSTER / "kuberay/common.yaml") if d["kind"] == "NetworkPolicy"
    ]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    [operator] = [
        peer for peer in peers if "kuberay-operator" in peer["podSelector"]["matchLabels"].values()
    ]
    [namespace] = operator["namespaceSelector"]["matchLabels"].values()
    install = (CLUSTER / "kuberay/rayjob-cpu-kind.yaml").read_text()
    assert re.findall(r"helm install .*--namespace (\S+)", install) == [namespace]
    for selector in ({}, {"matchLabels": {"team": "any"}}):
        open_to_all = copy.deepcopy(policy)
        open_to_all["spec"]["ingress"][1]["from"][0]["namespaceSelector"] = selector
        with pytest.raises(jsonschema.ValidationError):
            validate(open_to_all)


def test_the_secret_of_the_guide_reaches_kubectl_and_no_command_line(tmp_path):
    lines = (ROOT / "docs/cluster.md").read_text().splitlines()
    [line] = [line for line in lines if "kubectl create secret" in line]
    stub = tmp_path / "kubectl"
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/input\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HF_TOKEN": "hf_canary"}
    # xtrace prints the words of every command; printf is the shell's own and starts no process.
    done = subprocess.run(
        ["bash", "-xc", line], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0
    started = [words for words in done.stderr.splitlines() if not words.startswith("+ printf ")]
    assert started and not [words for words in started if "hf_canary" in words]
    assert (tmp_path / "input").read_text() == "hf_canary"
    assert "HF_TOKEN=/dev/stdin" in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize("cluster", ray_clusters())
def test_gpus_are_on_workers_only_and_start_parameters_are_ray_options(cluster):
    from ray.scripts.scripts import start

    options = {option.removeprefix("--") for p in start.params for option in p.opts}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group["rayStartParams"]) <= options
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_ray_version_is_the_tested_one():
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    for path in KUBERNETES:
        for version in re.findall(r'rayVersion: "(\S+)"', path.read_text()):
            assert version == pinned


def test_entry_points_are_commands_of_refscale_and_the_config_is_valid():
    [config, job] = documents(CLUSTER / "kuberay/rayjob-gpu.yaml")
    parsed = parse_config(yaml.safe_load(config["data"]["config.yaml"]))
    # With no GPU node up at the start, "as many as the cluster has" would be none.
    assert parsed.ray.gpus_per_replica and parsed.ray.gpus_per_worker
    prefix = "python -m refscale.cli "
    assert job["spec"]["entrypoint"].startswith(prefix)
    parse_command(job["spec"]["entrypoint"].removeprefix(prefix))
    [_, demo] = documents(CLUSTER / "kuberay/rayjob-cpu-kind.yaml")
    shell = re.fullmatch(r'sh -c "(.*)"', demo["spec"]["entrypoint"]).group(1)
    made, run = (part.strip() for part in shell.split("&&"))
    folder = re.fullmatch(r"python -m refscale\.demo (\S+)", made).group(1)
    parse_command(run.removeprefix(prefix))
    assert f"{folder}/config.yaml" in run


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
    installed = dict(re.findall(r"([\w-]+)(==\S+)?", step))
    assert set(distributions.values()) <= set(installed)
    constraints = (ROOT / "constraints.txt").read_text()
    for name, version in installed.items():
        assert version or re.search(rf"^{name}==", constraints, re.M), f"{name} is not pinned"


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
