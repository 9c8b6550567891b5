// Renders the chart as `helm template` does, and checks every object against the types of the Kubernetes API: unknown, doubled
// and mistyped fields are errors.
//
//	chart FOLDER RELEASE NAMESPACE VALUES    VALUES: YAML, what differs from the chart's values
package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	if len(os.Args) != 5 {
		fail(fmt.Errorf("usage: chart FOLDER RELEASE NAMESPACE VALUES"))
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "chart:", err)
	os.Exit(1)
}

func run(folder, release, namespace, text string) error {
	chart, err := loader.Load(folder)
	if err != nil {
		return err
	}
	if err := chart.Validate(); err != nil {
		return err
	}
	values, err := chartutil.ReadValues([]byte(text))
	if err != nil {
		return err
	}
	capabilities := chartutil.DefaultCapabilities.Copy()
	// Of which the types are: client-go 0.34.
	capabilities.KubeVersion = chartutil.KubeVersion{Version: "v1.34.0", Major: "1", Minor: "34"}
	if wanted := chart.Metadata.KubeVersion; !chartutil.IsCompatibleRange(wanted, capabilities.KubeVersion.Version) {
		return fmt.Errorf("the chart wants Kubernetes %s; this is %s", wanted, capabilities.KubeVersion.Version)
	}
	options := chartutil.ReleaseOptions{Name: release, Namespace: namespace, Revision: 1, IsInstall: true}
	merged, err := chartutil.ToRenderValues(chart, values, options, capabilities)
	if err != nil {
		return err
	}
	files, err := engine.Engine{Strict: true}.Render(chart, merged)
	if err != nil {
		return err
	}
	for name := range files {
		if strings.HasSuffix(name, "NOTES.txt") {
			delete(files, name)
		}
	}
	_, manifests, err := releaseutil.SortManifests(files, capabilities.APIVersions, releaseutil.InstallOrder)
	if err != nil {
		return err
	}
	decoder := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	var output bytes.Buffer
	for _, manifest := range manifests {
		_, _, err := decoder.Decode([]byte(manifest.Content), nil, nil)
		// The Prometheus operator's types are not Kubernetes' own.
		if runtime.IsNotRegisteredError(err) && strings.HasPrefix(manifest.Head.Version, "monitoring.coreos.com/") {
			err = nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", manifest.Name, err)
		}
		fmt.Fprintf(&output, "---\n# Source: %s\n%s\n", manifest.Name, strings.TrimSpace(manifest.Content))
	}
	_, err = output.WriteTo(os.Stdout)
	return err
}
