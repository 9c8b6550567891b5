#!/usr/bin/env bash
# Inside the Vagrant machine: builds the images, gives them to k3s, and does what kind.sh does from there on.
set -euo pipefail
cd "$(dirname "$0")/../.."
export KUBECONFIG=/etc/rancher/k3s/k3s.yaml

sudo docker build -f deploy/Dockerfile -t floe-agent:harness .
sudo docker build -f deploy/harness/demo.Dockerfile -t floe-demo:latest .
sudo docker save floe-agent:harness floe-demo:latest | sudo k3s ctr images import -
kubectl apply -f deploy/harness/jaeger.yaml
kubectl -n observability rollout status deployment/jaeger --timeout=180s
helm upgrade --install floe-agent deploy/helm/floe-agent --namespace observability \
    --set image.repository=docker.io/library/floe-agent --set image.tag=harness --set image.pullPolicy=Never \
    --set otlp.endpoint=http://jaeger.observability:4317 --wait --timeout 180s
kubectl -n observability exec daemonset/floe-agent -- floe-agent doctor
exec deploy/harness/kind.sh check
