#!/usr/bin/env bash
# Brings up a kind cluster with Jaeger, floe-agent and a dbt job, and checks that the job's trace arrives.
# Needs docker, kind, kubectl, helm, curl and jq. The nodes of kind are containers of this machine: the agent sees the
# machine's kernel, so this machine must have what `floe-agent doctor` asks for.
#
#   deploy/harness/kind.sh up       everything, then the check
#   deploy/harness/kind.sh check    run the job again and look for its trace
#   deploy/harness/kind.sh down     remove the cluster
set -euo pipefail
cd "$(dirname "$0")/../.."

cluster=floe
ui_port=16686

need() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || { echo "error: $tool is not there; install it and run this again" >&2; exit 1; }
    done
}

up() {
    need docker kind kubectl helm curl jq
    kind get clusters | grep -qx "$cluster" || kind create cluster --name "$cluster" --wait 120s
    docker build -f deploy/Dockerfile -t floe-agent:harness .
    docker build -f deploy/harness/demo.Dockerfile -t floe-demo:latest .
    kind load docker-image --name "$cluster" floe-agent:harness floe-demo:latest
    kubectl apply -f deploy/harness/jaeger.yaml
    kubectl -n observability rollout status deployment/jaeger --timeout=180s
    helm upgrade --install floe-agent deploy/helm/floe-agent --namespace observability \
        --set image.repository=floe-agent --set image.tag=harness \
        --set otlp.endpoint=http://jaeger.observability:4317 --wait --timeout 180s
    kubectl -n observability exec daemonset/floe-agent -- floe-agent doctor
    check
}

check() {
    need kubectl curl jq
    kubectl delete job floe-demo --ignore-not-found --wait
    kubectl apply -f deploy/harness/demo.yaml
    kubectl wait --for=condition=complete job/floe-demo --timeout=300s
    pod_uid=$(kubectl get pod -l app=floe-demo -o jsonpath='{.items[0].metadata.uid}')
    kubectl -n observability port-forward service/jaeger "$ui_port:16686" >/dev/null &
    forward=$!
    trap 'kill "$forward" 2>/dev/null || true' EXIT
    for _ in $(seq 30); do
        sleep 2
        traces=$(curl -fsS "http://localhost:$ui_port/api/traces?service=dbt&limit=20" || true)
        found=$(jq --arg uid "$pod_uid" '[.data[]? | .spans[] as $span | .processes[$span.processID].tags[]
            | select(.key == "k8s.pod.uid" and .value == $uid)] | length' <<<"$traces" 2>/dev/null || echo 0)
        if [ "${found:-0}" -gt 0 ]; then
            echo "the trace of pod $pod_uid is in Jaeger: $found spans"
            return
        fi
    done
    echo "error: no span of pod $pod_uid arrived in Jaeger; the agent says:" >&2
    kubectl -n observability logs daemonset/floe-agent --tail=50 >&2
    exit 1
}

down() {
    need kind
    kind delete cluster --name "$cluster"
}

case "${1:-}" in
    up | check | down) "$1" ;;
    *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
