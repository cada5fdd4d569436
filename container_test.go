package main

// What a container changes.

import (
	"strings"
	"testing"
	"testing/fstest"
)

// What the container's own tests cannot show everywhere: that a key which stays draws no
// warning, and one that does not stay draws one. The lines are Podman's and Docker's.
func TestKeyThatEndsWithItsContainerIsFound(t *testing.T) {
	const (
		podman  = "run/.containerenv"
		docker  = ".dockerenv"
		overlay = "640 639 0:52 / / rw,nodev,relatime - overlay overlay rw,lowerdir=/a\n"
		proc    = "646 640 0:56 / /proc rw - proc proc rw\n"
		named   = "650 640 8:1 /var/lib/containers/storage/volumes/privstack/_data /var/lib/privstack rw,relatime - ext4 /dev/vda1 rw\n"
		bind    = "650 640 8:1 /srv/relay /var/lib/privstack rw,relatime - ext4 /dev/vda1 rw\n"
		spaced  = "650 640 8:1 /srv/relay /var/lib/priv\\040stack rw,relatime - ext4 /dev/vda1 rw\n"
		memory  = "650 640 0:60 / /var/lib/privstack rw - tmpfs tmpfs rw\n"
	)
	unnamed := strings.Replace(named, "/privstack/_data", "/"+strings.Repeat("0123abcd", 8)+"/_data", 1)
	for _, tt := range []struct {
		name, mark, mounts, dir string
		want                    bool
	}{
		{"no volume", podman, overlay + proc, "/var/lib/privstack", true},
		{"no volume, Docker", docker, overlay + proc, "/var/lib/privstack", true},
		{"named volume", podman, overlay + proc + named, "/var/lib/privstack", false},
		{"below it", podman, overlay + proc + named, "/var/lib/privstack/more", false},
		{"beside it", podman, overlay + proc + named, "/var/lib/privstack2", true},
		{"unnamed volume", podman, overlay + proc + unnamed, "/var/lib/privstack", true},
		{"directory of the host", docker, overlay + proc + bind, "/var/lib/privstack", false},
		{"a space in its name", docker, overlay + proc + spaced, "/var/lib/priv stack", false},
		{"memory", podman, overlay + proc + memory, "/var/lib/privstack", true},
		{"a machine", "etc/hostname", overlay + proc, "/var/lib/privstack", false},
		{"a booted container", "run/systemd/container", overlay + proc, "/var/lib/privstack", false},
	} {
		root := fstest.MapFS{tt.mark: {}, "proc/self/mountinfo": {Data: []byte(tt.mounts)}}
		if got := endsWithContainer(root, tt.dir); got != tt.want {
			t.Errorf("%s: endsWithContainer(%s) = %v, want %v", tt.name, tt.dir, got, tt.want)
		}
	}
}
