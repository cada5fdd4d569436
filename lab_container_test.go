//go:build containers

package main

// The container image, run by Debian's Podman on hosts of the lab. .ci/image makes it, in
// dist/image, and runs these tests.

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// podman runs containers on one host of the lab, with a store of its own.
type podman struct {
	t     testing.TB
	pid   string // of a process in the host's namespaces
	store string
	image string
}

// hardened are the options that contrib/compose.yaml stands for.
var hardened = strings.Fields("--read-only --cap-drop=ALL --security-opt=no-new-privileges --memory=512m --stop-timeout=20")

// podman prepares one in the network namespace ns and loads the image.
func (l *lab) podman(ns string) *podman {
	l.t.Helper()
	t := l.t
	if _, err := exec.LookPath("podman"); err != nil {
		t.Skip("needs podman: apt-get install podman crun slirp4netns")
	}
	layout, err := filepath.Abs("dist/image")
	if err != nil {
		t.Fatal(err)
	}
	store, err := os.MkdirTemp("", "pod") // Podman takes only short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(store) })
	p := &podman{t: t, store: store, image: "relay"}
	// Where this user may not raise limits (no CAP_SYS_RESOURCE), Podman would try to.
	conf := "[containers]\ndefault_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]\n[engine]\nevents_logger = \"none\"\ncgroup_manager = \"cgroupfs\"\n[network]\nnetwork_backend = \"netavark\"\n"
	if err := os.WriteFile(filepath.Join(p.store, "containers.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	// In a mount namespace there is only one version of cgroups: crun refuses both. In a
	// process namespace nothing that Podman starts outlives the test.
	holder := exec.Command("nsenter", "--net=/run/netns/"+ns, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", `
		if grep -q ' cgroup ' /proc/mounts; then
			for at in $(awk '$3 == "cgroup2" { print $2 }' /proc/mounts); do umount -l "$at"; done
		fi
		echo ready
		exec sleep infinity`)
	ready, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.start(holder)
	if _, err := fmt.Fscanln(ready, new(string)); err != nil {
		t.Fatalf("namespaces for podman: %v", err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", holder.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	p.pid = strings.TrimSpace(string(children))
	t.Cleanup(func() { p.try("rm", "--all", "--force", "--time=0") })
	p.do("pull", "--quiet", "oci:"+layout)
	p.do("tag", p.do("images", "--quiet"), p.image)
	return p
}

func (p *podman) try(args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"--target=" + p.pid, "--mount", "--net", "--pid", "podman",
		"--root=" + p.store + "/root", "--runroot=" + p.store + "/run", "--storage-driver=vfs"}, args...)...)
	cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+p.store+"/containers.conf")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// do runs podman and returns what it prints.
func (p *podman) do(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Fatalf("podman %q: %v\n%s", args, err, out)
	}
	return out
}

// until waits until the log of the container relay matches what, and returns the match.
func (p *podman) until(what string) (match []string) {
	p.t.Helper()
	var out string
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.t.Logf("waited for %s in\n%s", what, out)
		}
	})
	eventually(p.t, "the log has "+what, func() bool {
		out, _ = p.try("logs", "relay")
		match = regexp.MustCompile(what).FindStringSubmatch(out)
		return match != nil
	})
	return match
}

// starts waits until the relay in the container serves. It is reached at addr.
func (p *podman) starts(addr string) peer.AddrInfo {
	p.t.Helper()
	p.until("relay ready")
	id, err := peer.Decode(p.until(`PeerId: +(\w+)`)[1])
	if err != nil {
		p.t.Fatal(err)
	}
	return peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{ma.StringCast(addr)}}
}

// The image as contrib/compose.yaml runs it: it serves, stops cleanly, and is the same relay
// in the next container.
func TestContainerLives(t *testing.T) {
	l := newLab(t)
	ns := l.public("relay", "11.0.0.1/8")
	p := l.podman(ns)
	run := func(args ...string) peer.AddrInfo {
		t.Helper()
		p.do(append(append([]string{"run", "--detach", "--name=relay", "--network=host", "--volume=privstack:/var/lib/privstack"}, hardened...), append([]string{p.image}, args...)...)...)
		return p.starts("/ip4/11.0.0.1/udp/4001/quic-v1")
	}
	relay := run()
	src, dst := l.client(l.public("src", "11.0.0.2/8"), relay), l.client(l.public("dst", "11.0.0.3/8"), relay)
	dst.must(labRequest{Do: "put"})
	if got := src.must(labRequest{Do: "get"}); got.ID != dst.id {
		t.Errorf("record found is %v's, want %v's", got.ID, dst.id)
	}
	if report := l.check(l.public("operator", "11.0.0.4/8"), "11.0.0.1"); !report.OK {
		t.Errorf("check fails:\n%s", report.text())
	}
	if line := p.until(`msg=limits.*`)[0]; !strings.Contains(line, `because_of="512 MiB of memory (cgroup)"`) {
		t.Errorf("log has %s, want the container's memory", line)
	}
	if out, _ := p.try("logs", "relay"); strings.Contains(out, "gone with the container") {
		t.Errorf("warns of a key that stays:\n%s", out)
	}
	if out := p.do("exec", "relay", "/usr/bin/privstack-relay", "healthy"); out != "ok" {
		t.Errorf("healthy = %q, want ok", out)
	}

	p.do("stop", "relay")
	p.until(`msg=stopped`)
	if got := p.do("inspect", "--format={{.State.ExitCode}}", "relay"); got != "0" {
		t.Errorf("exit status %s, want 0", got)
	}
	p.do("rm", "relay")
	if again := run("--max-clients=77"); again.ID != relay.ID {
		t.Errorf("peer ID %v, was %v", again.ID, relay.ID)
	}
	if line := p.until(`msg=limits.*`)[0]; !strings.Contains(line, "max_clients=77 ") {
		t.Errorf("log has %s, want the flag of the second container", line)
	}
}

// contrib/compose.yaml asks for what TestContainerLives runs.
func TestComposeFileIsTheTestedOne(t *testing.T) {
	text, err := os.ReadFile("contrib/compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"network_mode: host", "- privstack:/var/lib/privstack", "read_only: true", "cap_drop: [ALL]", "security_opt: [no-new-privileges]",
		"mem_limit: 512m", "stop_grace_period: 20s", "test: [CMD, /usr/bin/privstack-relay, healthy]",
	} {
		if !strings.Contains(string(text), "    "+line+"\n") {
			t.Errorf("contrib/compose.yaml lacks %q", line)
		}
	}
}

// What goes wrong with volumes is what self-hosters ask about most.
func TestContainerSaysWhatItsVolumeLacks(t *testing.T) {
	l := newLab(t)
	p := l.podman(l.public("relay", "11.0.0.1/8"))
	dir := t.TempDir()
	out, err := p.try("run", "--rm", "--network=host", "--volume="+dir+":/var/lib/privstack", p.image)
	if want := "cannot make the key in /var/lib/privstack: permission denied: let uid 65532 write there, as root: chown 65532 /var/lib/privstack"; err == nil || !strings.Contains(out, want) {
		t.Errorf("with a directory of root: %v, %q, want %q", err, out, want)
	}
	if err := os.Chown(dir, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		args []string
		lost bool
	}{
		{"no volume", nil, true},
		{"memory", []string{"--tmpfs=/var/lib/privstack:mode=1777"}, true},
		{"that directory", []string{"--volume=" + dir + ":/var/lib/privstack"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p.do(append(append([]string{"run", "--detach", "--name=relay", "--network=host"}, tt.args...), p.image)...)
			p.until("relay ready")
			out := p.do("logs", "relay")
			if got := strings.Contains(out, "this key is gone with the container"); got != tt.lost {
				t.Errorf("warns that the key gets lost: %v, want %v\n%s", got, tt.lost, out)
			}
			p.do("rm", "--force", "relay")
		})
	}
}

// A published port can hide where clients are. The relay and the check both say so, and
// what helps does help.
func TestContainerBehindAPublishedPort(t *testing.T) {
	l := newLab(t)
	ns := l.public("relay", "11.0.0.1/8")
	p := l.podman(ns)
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("slirp4netns needs /dev/net/tun")
	}
	run := func(network string) peer.AddrInfo {
		t.Helper()
		p.do("run", "--detach", "--name=relay", "--network="+network, "--publish=4001:4001/udp", "--publish=4002:4002", "--volume=privstack:/var/lib/privstack",
			p.image, "--announce=11.0.0.1")
		return p.starts("/ip4/11.0.0.1/udp/4001/quic-v1")
	}
	operator := l.public("operator", "11.0.0.9/8")
	observed := func() checkStep {
		t.Helper()
		return l.check(operator, "11.0.0.1").step(t, "observed")
	}

	relay := run("slirp4netns:port_handler=rootlesskit")
	for i := range 2 {
		l.client(l.public("home", fmt.Sprintf("11.0.0.%d/8", 2+i)), relay)
	}
	p.until(`all clients come from one private address.*addr=10\.0\.2\.100 clients=2`)
	if s := observed(); s.Result != checkFailed || !strings.Contains(fmt.Sprint(s.Try), "port_handler=slirp4netns") {
		t.Errorf("observed = %+v, want it failed, with the way out", s)
	}
	p.do("rm", "--force", "relay")

	run("slirp4netns:port_handler=slirp4netns")
	if s := observed(); s.Result != checkPassed || !strings.HasPrefix(fmt.Sprint(s.Values["address"]), "11.0.0.9:") {
		t.Errorf("observed = %+v, want the client's address", s)
	}
}

// What is in the image, and what is not.
func TestImageHoldsNothingElse(t *testing.T) {
	l := newLab(t)
	p := l.podman(l.public("relay", "11.0.0.1/8"))
	p.do("create", "--name=relay", "--network=host", p.image)
	tar := filepath.Join(t.TempDir(), "image.tar")
	p.do("export", "--output="+tar, "relay")
	list, err := exec.Command("tar", "tf", tar).Output()
	if err != nil {
		t.Fatal(err)
	}
	// Podman adds these when it makes a container.
	added := regexp.MustCompile(`^(dev|proc|sys|run)/|^etc/(hosts|hostname|resolv.conf|mtab)$|/$`)
	files := slices.DeleteFunc(strings.Fields(string(list)), added.MatchString)
	slices.Sort(files)
	if got := strings.Join(files, " "); got != "etc/ssl/certs/ca-certificates.crt usr/bin/privstack-relay" {
		t.Errorf("the image holds %s", got)
	}
	var images []struct {
		Os, Architecture, User string
		Config                 struct {
			Volumes, ExposedPorts map[string]any
			Entrypoint            []string
			Labels                map[string]string
		}
	}
	if err := json.Unmarshal([]byte(p.do("inspect", "--type=image", p.image)), &images); err != nil {
		t.Fatal(err)
	}
	image := images[0]
	got := fmt.Sprintf("%v %v %v %v", image.User, image.Config.Volumes, image.Config.ExposedPorts, image.Config.Entrypoint)
	if want := "65532:65532 map[/var/lib/privstack:map[]] map[4001/udp:map[] 4002/tcp:map[]] [/usr/bin/privstack-relay]"; got != want {
		t.Errorf("the image is %s, want %s", got, want)
	}
	version := strings.TrimPrefix(p.do("run", "--rm", "--network=host", p.image, "--version"), "privstack-relay ")
	if label := image.Config.Labels["org.opencontainers.image.version"]; label != version {
		t.Errorf("the label says version %q, the program %q", label, version)
	}
}
