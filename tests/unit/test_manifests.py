"""The Kubernetes manifests of cluster/: strict schemas, and what a security reviewer asks of them.

And the image's layers, and the Slurm script, run with commands that only say how they were called.

KubeRay's own schema is large and, as published, lets misspelt fields pass. Here is the part of it
that our manifests use, closed: a field that is not in it is an error.
"""

import copy
import re
import subprocess
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


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob-gpu.yaml"])
def test_a_gpu_pod_is_a_whole_node_with_room_for_checkpoints_of_an_8b_model(name):
    document = documents(CLUSTER / "kuberay" / name)[-1]["spec"]
    groups = document.get("rayClusterSpec", document)["workerGroupSpecs"]
    [group] = [group for group in groups if group["groupName"] == "gpu"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    # Pods of one GPU each would not reach each other over NVLink.
    assert limits["nvidia.com/gpu"] == "8"
    # A checkpoint of ZeRO-2 on one node has the weights twice and 12 bytes a parameter; two of them
    # are there at once with the policy and the model cache, and 100 GiB are left for all else.
    needed = (2 * (4 + 12) + 2 + 2) * 8.03e9 / 2**30 + 100
    assert int(limits["ephemeral-storage"].removesuffix("Gi")) > needed
    if name == "rayjob-gpu.yaml":
        config = yaml.safe_load(documents(CLUSTER / "kuberay" / name)[0]["data"]["config.yaml"])
        assert config["train"]["num_workers"] == 8 * group["maxReplicas"]
        assert config["ray"]["replicas"]["max"] == 8 * group["maxReplicas"]


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


def test_a_change_to_the_code_does_not_install_its_dependencies_again():
    text = (CLUSTER / "Dockerfile").read_text()
    before, after = text.split("COPY refscale ./refscale\n")
    assert "README.md" not in re.search(r"^COPY (.*)$", before, re.M)[1]
    # No dependency is left to install, and nothing that setuptools built before is newer than the
    # files it would take now.
    installs = re.findall(r"pip install .*", after)
    assert installs == ["pip install -c constraints.txt --no-deps ."]
    made = re.search(r"mkdir (\S+) && touch README.md", before)[1]
    removed = re.search(r"rm -rf (build .*) \\\n", before)[1].split()
    assert {"build", made, f"{made}.egg-info"} == set(removed)


# -- Slurm ---------------------------------------------------------------------------------------

_SRUN = """#!/bin/bash
token=$(stat -c %a "$RAY_AUTH_TOKEN_PATH" 2> /dev/null)
echo "cpus=$SRUN_CPUS_PER_TASK auth=$RAY_AUTH_MODE token=$token $*" >> "$CALLS"
case "$*" in
  *hostname*) echo "10.0.0.1 fe80::1" ;;
  *"refscale run"*)
    until [[ $(grep -c "ray start" "$CALLS") -eq 2 ]]; do sleep 0.05; done
    exit 3 ;;
esac
"""


@pytest.mark.parametrize("gpus", [{"SLURM_GPUS_ON_NODE": "4"}, {}])
def test_the_slurm_script_gives_ray_its_cpus_and_gpus_and_hides_its_token(tmp_path, gpus):
    stubs = {
        "srun": _SRUN,
        "scontrol": "#!/bin/sh\necho n1; echo n2\n",
        # Makes the token, and counts the nodes.
        "python": '#!/bin/sh\ncase "$2" in *secrets*) printf abc ;; *) echo 2 ;; esac\n',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "16",
        **gpus,
    }
    script = CLUSTER / "slurm/refscale.sbatch"
    done = subprocess.run(
        ["bash", script, "config.yaml", "/shared/run"], env=env, capture_output=True, text=True
    )
    # The exit code is that of the run.
    assert done.returncode == 3, done.stderr
    hostname, *calls = (tmp_path / "calls").read_text().splitlines()
    assert "-w n1 hostname" in hostname
    assert len(calls) == 3
    for call in calls:
        assert call.startswith("cpus=16 auth=token token=600 --overlap")
    head, worker = sorted(
        (call for call in calls if "ray start" in call), key=lambda call: "--head" not in call
    )
    for call in (head, worker):
        assert f"--num-cpus=16 --num-gpus={gpus.get('SLURM_GPUS_ON_NODE', '0')} " in call
    assert "--node-ip-address=10.0.0.1 --port=23456" in head
    assert "-w n2 ray start --address=10.0.0.1:23456" in worker
    assert not list((tmp_path / ".ray").iterdir())
