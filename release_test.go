package main

// How releases are made.

import (
	"os"
	"strings"
	"testing"
)

// A build runs the code of hundreds of modules and tools. If one of them turns bad, it
// must find no token that can write here or vouch for a binary.
func TestReleaseIsBuiltWithoutTheRightToPublish(t *testing.T) {
	text, err := os.ReadFile(".github/workflows/release.yml")
	if err != nil {
		t.Fatal(err)
	}
	before, jobs, _ := strings.Cut(string(text), "\njobs:\n")
	if !strings.Contains(before, "\npermissions: {}") {
		t.Error("jobs have permissions that they do not name")
	}
	build, publish, found := strings.Cut(jobs, "\n  publish:\n")
	if !found || !strings.Contains(build, "  build:\n") {
		t.Fatalf("want the jobs build and publish, got %s", jobs)
	}
	for _, right := range []string{": write", "id-token", "github.token", "secrets."} {
		if strings.Contains(build, right) {
			t.Errorf("the job build has %q", right)
		}
	}
	for _, code := range []string{"checkout", "setup-go", ".ci/", "go run", "go install"} {
		if strings.Contains(publish, code) {
			t.Errorf("the job publish runs %q beside its rights", code)
		}
	}
}
