package main

// The command line and the built binary, as operators and programs meet them.

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	quicgo "github.com/quic-go/quic-go"
)

// The old relay's flags keep their names, short forms and defaults, because units and
// scripts use them.
func TestFlags(t *testing.T) {
	bare := config{
		port: 4001, httpPort: 4002, keyFile: "relay-identity.key",
		circuitDuration: time.Hour, circuitBytes: 1 << 30, maxClientsPerIP: 256,
	}
	with := func(change func(*config)) config {
		cfg := bare
		change(&cfg)
		return cfg
	}
	tests := []struct {
		args []string
		want config
	}{
		{nil, bare},
		{[]string{"-p", "1", "-i", "k", "-v"}, with(func(c *config) { c.port, c.keyFile, c.verbose = 1, "k", true })},
		{[]string{"--port", "1", "--identity=k", "--verbose"}, with(func(c *config) { c.port, c.keyFile, c.verbose = 1, "k", true })},
		{[]string{"--port=04001"}, bare}, // not an octal number
		{[]string{"-port=1", "-http-port", "0"}, with(func(c *config) { c.port, c.httpPort = 1, 0 })},
		{[]string{"--circuit-duration", "90m", "--circuit-bytes", "512MiB"}, with(func(c *config) { c.circuitDuration, c.circuitBytes = 90*time.Minute, 512<<20 })},
		{[]string{"--circuit-duration", "1d", "--circuit-bytes", "512M"}, with(func(c *config) { c.circuitDuration, c.circuitBytes = 24*time.Hour, 512<<20 })},
		{[]string{"--circuit-duration=0", "--circuit-bytes=0"}, with(func(c *config) { c.circuitDuration, c.circuitBytes = 0, 0 })},
		{[]string{"--max-bandwidth=5MiB"}, with(func(c *config) { c.maxBandwidth = 5 << 20 })},
		{[]string{"--max-bandwidth=0"}, bare},
		{[]string{"--max-clients=7", "--max-clients-per-ip=3"}, with(func(c *config) { c.maxClients, c.maxClientsPerIP = 7, 3 })},
		{[]string{"--metrics", "127.0.0.1:4003"}, with(func(c *config) { c.metrics = "127.0.0.1:4003" })},
		{[]string{"--announce=1.2.3.4", "--announce", "relay.example.org"}, with(func(c *config) { c.announce = []string{"1.2.3.4", "relay.example.org"} })},
	}
	for _, tt := range tests {
		got, err := parseFlags(tt.args)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("parseFlags(%q) = %+v, %v, want %+v", tt.args, got, err, tt.want)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for _, tt := range []struct{ arg, says string }{
		{"--port=70000", "--port 70000 is not between"},
		{"--port=-1", "not between"},
		{"--http-port=65536", "--http-port 65536"},
		{"--port=x", `--port "x": not a number`},
		{"-p=4001x", `-p "4001x": not a number`},
		{"--max-clients=1e3", `--max-clients "1e3": not a number`},
		{"--max-clients=0x10", `--max-clients "0x10": not a number`},
		{"--port=99999999999999999999", "is not between"},
		{"--port", "--port needs a value"},
		{"--verbose=perhaps", `--verbose "perhaps": a switch takes no value`},
		{"--identity=", "--identity needs"},
		{"--nonsense", "there is no flag --nonsense"},
		{"-nonsense=1", "there is no flag --nonsense"},
		{"-x", "there is no flag -x"},
		{"-p4001", "there is no flag -p4001; write -p 4001"}, // which many programs take
		{"--prot=4001", "there is no flag --prot"},
		{"stray", `unexpected argument "stray"`},
		{"check", `unexpected argument "check"; write it first: privstack-relay check`},
		{"—port", `flags begin with two hyphens: --port`}, // as some pages show it
		{"–-port", `flags begin with two hyphens: --port`},
		{"--circuit-duration=-1s", "negative"},
		{"--circuit-duration=10ms", "under one second"},
		{"--circuit-duration=2000000h", "use 0 for unlimited"},
		{"--circuit-duration=5", `--circuit-duration "5": write a number and a unit, such as 30m or 24h`},
		{"--circuit-duration=d", "such as 30m or 24h"},
		{"--circuit-duration=-1d", "such as 30m or 24h"},
		{`--announce=a"quoted"one`, `--announce "a\"quoted\"one": write an IP address`},
		{"--circuit-bytes=-1", "not between"},
		{"--circuit-bytes=lots", "not a size; write 512MiB or 1GiB, or 0 for unlimited"},
		{"--circuit-duration=9999999h", "or 0 for unlimited"},
		{"--max-bandwidth=-1", "not between"},
		{"--max-bandwidth=5MiB/s", "not a size; write bytes per second, such as 5MiB, or 0 for unlimited"},
		{"--max-bandwidth=1KiB", "use 0 for unlimited"},
		{"--max-clients=-1", "--max-clients -1"},
		{"--max-clients=99999999", "--max-clients 99999999"},
		{"--max-clients-per-ip=0", "below 1"},
		{"--announce=not_an_address!", "write an IP address"},
		{"--announce=203.0.113.7:443", "leave the port out, or write /ip4/203.0.113.7/udp/443/quic-v1"},
		{"--announce=[2001:db8::7]:443", "leave the port out, or write /ip6/2001:db8::7/udp/443/quic-v1"},
		{"--announce=relay.example.org:443", "leave the port out, or write /dns/relay.example.org/udp/443/quic-v1"},
		{"--announce=[2001:db8::7]", "without brackets"},
		{"--announce=https://relay.example.org/x", "a URL; write the host alone, such as relay.example.org"},
		{"--announce=203.0.113.7,2001:db8::7", "give the flag again for each of the others"},
		{"--announce=203.0.113.7 2001:db8::7", "give the flag again for each of the others"},
		{"--announce=fe80::1", "not an address that a client can reach"},
		{"--bootstrap=203.0.113.7", "no peer ID"},
		{"--bootstrap=relay.example.org", "no peer ID"},
		{"--bootstrap=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV", "not the address of a relay"},
		{"--bootstrap=/ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooWbad", "/quic-v1/p2p/12D3KooWbad\": not the address of a relay; write what the other relay's banner shows"},
		{"--bootstrap=", "write what the other relay's banner shows"},
		{"--metrics=127.0.0.1:4002", "--metrics and --http-port both want TCP port 4002"},
		{"--metrics=", "write a host and a port, such as 127.0.0.1:4003"},
		{"--metrics=127.0.0.1", "write a host and a port"},
		{"--metrics=4003", "write a host and a port"},
		{"--metrics=127.0.0.1:65536", "write a host and a port"},
		{"--metrics=127.0.0.1:http", "write a host and a port"},
	} {
		_, err := parseFlags([]string{tt.arg})
		if !errors.As(err, new(usageError)) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("parseFlags(%q) error = %v, want a usageError that says %q", tt.arg, err, tt.says)
		}
	}
	many := slices.Repeat([]string{"--announce=192.0.2.1"}, maxAnnounce+1)
	if _, err := parseFlags(many); !errors.As(err, new(usageError)) {
		t.Errorf("parseFlags with %d addresses: error = %v, want a usageError", len(many), err)
	}
}

// --help tells what a relay does that is started without any flag.
func TestHelpTellsTheDefaults(t *testing.T) {
	bare, err := parseFlags(nil)
	if err != nil {
		t.Fatal(err)
	}
	// An entry is a line with a flag, and the lines after it that have none.
	entry := regexp.MustCompile(`(?m)^ +(?:-\w, )?(--[a-z-]+)( [A-Z]+)? .*(?:\n {20,}.*)*`)
	literal := regexp.MustCompile(`\(default ([^)]*)\)`)
	told := 0
	for _, match := range entry.FindAllStringSubmatch(usage, -1) {
		text, flag := strings.Join(strings.Fields(match[0]), " "), match[1]
		value := literal.FindStringSubmatch(text)
		if value == nil {
			continue // a switch, a list, or a default that is described
		}
		if got, err := parseFlags([]string{flag + "=" + value[1]}); err != nil || !reflect.DeepEqual(got, bare) {
			t.Errorf("--help says that the default of %s is %s, but with it parseFlags = %+v, %v, and without it %+v", flag, value[1], got, err, bare)
		}
		if value[1] != "0" {
			told++
		}
	}
	set := 0
	for _, field := range reflect.ValueOf(bare).Fields() {
		if !field.IsZero() {
			set++
		}
	}
	if told != set || told == 0 {
		t.Errorf("--help tells %d defaults that are not 0, and parseFlags sets %d", told, set)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1048576": 1 << 20, "1KiB": 1 << 10, "512MiB": 512 << 20, "1.5GiB": 3 << 29,
		"512M": 512 << 20, "1g": 1 << 30, "2TiB": 2 << 40, "10MB": 10_000_000, "1 gib": 1 << 30, "7B": 7,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "MiB", "0.5", "1XiB", "-1", "1e30", "NaN", "inf", "1 2", "0x"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", s, got)
		}
	}
}

// What an operator may write for --announce, and what clients are told then.
func TestParseAnnounce(t *testing.T) {
	const id = "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
	for s, want := range map[string]string{
		"203.0.113.7":                              "/ip4/203.0.113.7/udp/4001/quic-v1",
		"2001:db8::7":                              "/ip6/2001:db8::7/udp/4001/quic-v1",
		"::ffff:203.0.113.7":                       "/ip4/203.0.113.7/udp/4001/quic-v1",
		"relay.example.org":                        "/dns/relay.example.org/udp/4001/quic-v1",
		"relay.example.org.":                       "/dns/relay.example.org/udp/4001/quic-v1",
		"localhost":                                "/dns/localhost/udp/4001/quic-v1",
		"/ip4/203.0.113.7/udp/1/quic-v1":           "/ip4/203.0.113.7/udp/1/quic-v1",
		"/dns4/a.example/udp/443/quic-v1":          "/dns4/a.example/udp/443/quic-v1",
		"/ip4/203.0.113.7/udp/1/quic-v1/p2p/" + id: "/ip4/203.0.113.7/udp/1/quic-v1/p2p/" + id,
	} {
		got, err := parseAnnounce(s, 4001)
		if err != nil || got.String() != want {
			t.Errorf("parseAnnounce(%q) = %v, %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "203.0.113.7:4001", "[2001:db8::7]:4001", "https://relay.example.org", "-x.org", "a..b", "1.2.3", "fe80::1%eth0",
		"0.0.0.0", "::", "224.0.0.1", "/ip4/0.0.0.0/udp/1/quic-v1", "/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3.4",
		"/ip4/1.2.3.4/udp/0/quic-v1", "/dns/relay.example.org/udp/0/quic-v1", "relay.example.org:0",
		"/ip4/1.2.3.4/udp/1/quic-v1/webtransport", "/ip4/1.2.3.4/udp/1/quic-v1/p2p/" + id + "/p2p-circuit",
		"/p2p/" + id, "fe80::1", "/ip6/fe80::1/udp/1/quic-v1", "/dns/" + strings.Repeat("a", 300) + "/udp/1/quic-v1", "/nonsense", "/", strings.Repeat("a.", 200) + "org",
	} {
		if got, err := parseAnnounce(s, 4001); err == nil {
			t.Errorf("parseAnnounce(%q) = %v, want an error", s, got)
		}
	}
	key := newTestKey(t)
	if _, err := startRelay(config{announce: []string{"/ip4/203.0.113.7/udp/1/quic-v1/p2p/" + id}, maxClientsPerIP: 1}, key, nil); err == nil || !strings.Contains(err.Error(), peerIDOf(t, key)) {
		t.Errorf("announcing another relay's ID: error = %v, want one that names ours", err)
	}
}

// What an operator writes is either refused or read in a form that means the same when
// it is written again.
func FuzzAnnounceAndSize(f *testing.F) {
	for _, s := range []string{"203.0.113.7", "::1", "relay.example.org.", "/dns4/a/udp/443/quic-v1", "512MiB", "1e3", "-0", "0x1p4", "9EiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if addr, err := parseAnnounce(s, 4001); err == nil {
			again, err := parseAnnounce(addr.String(), 1)
			if err != nil || !again.Equal(addr) {
				t.Errorf("parseAnnounce(%q) = %v, which in turn is read as %v, %v", s, addr, again, err)
			}
		}
		if n, err := parseSize(s); err == nil {
			again, err := parseSize(fmt.Sprint(n))
			if n < 0 || err != nil || float64(again) != float64(n) {
				t.Errorf("parseSize(%q) = %d, which in turn is read as %d, %v", s, n, again, err)
			}
		}
	})
}

// The first minute of every operator, and of every program that starts a relay and
// parses its output.
func TestProcessStartsAnswersAndStops(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	if !strings.Contains(p.stdout, "\n  PeerId:    12D3KooW") {
		t.Errorf("banner = %q, want a line that begins \"  PeerId:    \"", p.stdout)
	}
	if p.bootstrap.ID.String() != p.peerID {
		t.Errorf("bootstrap address names %v, want %s", p.bootstrap.ID, p.peerID)
	}
	resp, err := http.Get(p.http + "/api/v1/identity")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 200 || !strings.HasPrefix(string(body), `{"peer_id":"`+p.peerID+`","addresses":["/ip4/0.0.0.0/udp/`) {
		t.Errorf("identity = %d %s, want the banner's peer ID", resp.StatusCode, body)
	}
	if err := newClient(t).Connect(testContext(t), p.bootstrap); err != nil {
		t.Errorf("connect: %v", err)
	}
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d after SIGTERM, want 0", code)
	}
	for _, want := range []string{"relay ready", "new identity key made", "msg=stopped peers_served=1 relayed_connections=0"} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("log lacks %q:\n%s", want, p.stderr)
		}
	}
	// Whoever reads the log must not learn who was here.
	if n := strings.Count(p.stderr.String(), "12D3KooW"); n != 1 {
		t.Errorf("%d peer IDs in a quiet log, want the relay's own once:\n%s", n, p.stderr)
	}
}

// Each transport that is linked is more code to attack and more modules to patch. The
// relay needs only QUIC, but libp2p.New would link all of them.
func TestBinaryLinksQUICAlone(t *testing.T) {
	name, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range info.Deps {
		if strings.HasPrefix(m.Path, "github.com/pion/") || strings.HasSuffix(m.Path, "/websocket") || strings.HasSuffix(m.Path, "/webtransport-go") {
			t.Errorf("the binary links %s", m.Path)
		}
	}
	// The transports are packages of one module, so only symbols tell them apart.
	symbols, err := exec.Command("go", "tool", "nm", name).Output()
	if err != nil {
		t.Fatalf("go tool nm: %v", err)
	}
	linked := make(map[string]bool)
	for _, match := range regexp.MustCompile(`go-libp2p/p2p/transport/(\w+)`).FindAllSubmatch(symbols, -1) {
		linked[string(match[1])] = true
	}
	if got, want := slices.Sorted(maps.Keys(linked)), []string{"quic", "quicreuse"}; !slices.Equal(got, want) {
		t.Errorf("the binary links the transports %v, want %v", got, want)
	}
}

func TestProcessSaysWhatItIsAskedFor(t *testing.T) {
	for _, flag := range []string{"--help", "-h"} {
		if out, err := command(t, flag).Output(); err != nil || string(out) != usage {
			t.Errorf("%s = %q, %v, want the usage and exit status 0", flag, out, err)
		}
	}
	if out, err := command(t, "--version").Output(); err != nil || !strings.HasPrefix(string(out), "privstack-relay ") {
		t.Errorf("--version = %q, %v", out, err)
	}
}

// A relay that cannot start says why in one sentence and exits. It never leaves a
// process that looks alive.
func TestProcessFailsClearly(t *testing.T) {
	udp, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udpPort := fmt.Sprint(udp.LocalAddr().(*net.UDPAddr).Port)
	tcpPort := fmt.Sprint(tcp.Addr().(*net.TCPAddr).Port)
	bad := filepath.Join(t.TempDir(), "bad.key")
	if err := os.WriteFile(bad, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		code int
		says string
	}{
		{"UDP port taken", []string{"--http-port=0", "--port=" + udpPort}, 1, "UDP port " + udpPort + ", perhaps another relay (ss -lunp 'sport = :" + udpPort + "' shows which); stop it, or choose another port with --port\n"},
		{"TCP port taken", []string{"--port=0", "--http-port=" + tcpPort}, 1, "TCP port " + tcpPort + ", perhaps another relay (ss -ltnp 'sport = :" + tcpPort + "' shows which); stop it, or choose another port with --http-port\n"},
		{"metrics port taken", []string{"--port=0", "--http-port=0", "--metrics=127.0.0.1:" + tcpPort}, 1, "choose another port with --metrics\n"},
		{"not an address of this machine", []string{"--port=0", "--http-port=0", "--metrics=192.0.2.77:0"}, 1, "this machine does not have that address; choose another one with --metrics\n"},
		{"bad key", []string{"--identity=" + bad}, 1, bad + " is not a libp2p Ed25519 key file"},
		{"key is a directory", []string{"--identity=" + t.TempDir()}, 1, "is a directory"},
		{"no such directory", []string{"--identity=/nonexistent/key"}, 1, "identity: cannot make the key in /nonexistent: there is no such directory\n"},
		{"unknown flag", []string{"--nonsense"}, 2, "nonsense"},
		{"stray argument", []string{"start"}, 2, `unexpected argument "start"`},
		{"not a flag of check", []string{"check", "--port", "4001", "localhost"}, 2, "check: there is no flag --port\nTry 'privstack-relay check --help'.\n"},
		{"nor is -p", []string{"check", "-p", "4001", "localhost"}, 2, "check: there is no flag -p\n"},
		{"no relay to check", []string{"check"}, 2, "check needs one relay: a host name, an address or a URL\nTry 'privstack-relay check --help'.\n"},
		{"an empty name to check", []string{"check", ""}, 2, `check "": write`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if runtime.GOOS == "windows" && strings.Contains(tt.says, "/nonexistent") {
				t.Skip("a Unix path")
			}
			cmd := command(t, tt.args...)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			context.AfterFunc(ctx, func() {
				if errors.Is(ctx.Err(), context.DeadlineExceeded) && cmd.Process != nil {
					cmd.Process.Kill()
				}
			})
			cmd.Run()
			if code := cmd.ProcessState.ExitCode(); code != tt.code || !strings.Contains(stderr.String(), tt.says) || stdout.Len() > 0 {
				t.Errorf("exit status %d, stdout %q, stderr %q, want %d, nothing, and %q", code, &stdout, &stderr, tt.code, tt.says)
			}
		})
	}
}

// The relay restarts in the middle of a sync: the sync gets a few more seconds, new work
// is refused, and a monitor sees it.
func TestProcessDrainsOnSIGTERM(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	r := testRelay{info: p.bootstrap}
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, r, src, dst)
	s := openEcho(t, src, dst)

	p.Process.Signal(syscall.SIGTERM)
	eventually(t, "health turns 503", func() bool {
		resp, err := http.Get(p.http + "/healthz")
		if err != nil {
			t.Fatalf("healthz while stopping: %v", err)
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusServiceUnavailable
	})
	if _, err := circuitclient.Reserve(testContext(t), src, r.info); err == nil {
		t.Error("the relay accepted a reservation while it was stopping")
	}
	if _, err := io.WriteString(s, "end"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 3)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "end" {
		t.Errorf("the open circuit carried %q, %v", got, err)
	}
	// The circuit stays open, so the relay closes it when the time is up. That is no
	// failure.
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d, want 0", code)
	}
	if !strings.Contains(p.stderr.String(), "msg=stopped peers_served=2 relayed_connections=1") {
		t.Errorf("log lacks the final counters:\n%s", p.stderr)
	}
}

// After a power cut clients learn at once that their connection is gone, not only when it
// times out: the next process has the key to tell them.
func TestKilledRelayTellsItsClientsWhenItIsBack(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	ctx := testContext(t)
	c, err := newCrowd(t, 1).newcomer(ctx, p.bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.open(ctx, string(kadProtocol))
	if err != nil {
		t.Fatal(err)
	}
	p.Process.Kill()
	p.wait(t)
	port, _ := p.bootstrap.Addrs[0].ValueForProtocol(ma.P_UDP)
	start(t, "--port="+port, "--identity="+filepath.Join(p.Dir, "relay-identity.key"))

	// A packet must be longer than the reset it provokes, or two servers could send
	// resets to each other for ever. The write fails if one has arrived already.
	s.Write(make([]byte, 1000))
	select {
	case <-c.Context().Done():
	case <-ctx.Done():
		t.Fatal("the connection is still open")
	}
	if err := context.Cause(c.Context()); !errors.As(err, new(*quicgo.StatelessResetError)) {
		t.Errorf("the connection ended with %q, want a stateless reset", err)
	}
}

// An operator who asks twice wants the process gone.
func TestSecondSignalKills(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, testRelay{info: p.bootstrap}, src, dst)
	openEcho(t, src, dst) // delays the stop for seconds

	p.Process.Signal(os.Interrupt)
	eventually(t, "the relay acts on the first signal", func() bool {
		resp, err := http.Get(p.http + "/healthz")
		if err == nil {
			resp.Body.Close()
		}
		return err != nil || resp.StatusCode == http.StatusServiceUnavailable
	})
	// A signal that comes at once with the first is not counted, so he asks again.
	ended, asking := make(chan struct{}), new(sync.WaitGroup)
	asking.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.Process.Signal(os.Interrupt)
			case <-ended:
				return
			}
		}
	})
	code := p.wait(t)
	close(ended)
	asking.Wait()
	if code != -1 {
		t.Errorf("exit status %d, want death by signal", code)
	}
}

// Who stops a whole group of processes may signal each of them and the group as well. That
// is one request, and a clean stop.
func TestTwoSignalsAtOnceAreOne(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, testRelay{info: p.bootstrap}, src, dst)
	s := openEcho(t, src, dst) // delays the stop for longer than the signals are apart
	p.Process.Signal(syscall.SIGTERM)
	p.Process.Signal(syscall.SIGTERM)
	eventually(t, "the relay stops", func() bool { return p.stderr.line("msg=stopping") != "" || p.stderr.line("stopping") != "" })
	s.Reset()
	if code := p.wait(t); code != 0 || p.stderr.line("stopped") == "" {
		t.Errorf("exit status %d, want 0 and a clean stop:\n%s", code, p.stderr)
	}
}

// A port scanner, or a monitor that has just connected, does not make a stop look like a
// failure to the service manager.
func TestStopIsCleanWhileSomebodyConnects(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	addr := strings.TrimPrefix(p.http, "http://")
	silent, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	// A connection that was opened later is answered, so the relay has accepted both.
	if out, err := command(t, "healthy", "--http-port", addr[strings.LastIndex(addr, ":")+1:]).CombinedOutput(); err != nil {
		t.Fatalf("healthy: %v\n%s", err, out)
	}
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d, want 0:\n%s", code, p.stderr)
	}
}

// A hung relay leaves a dump that fits into the journal, and an exit status that makes
// systemd start it again.
func TestAbortedProcessTellsWhatItDid(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	p.Process.Signal(syscall.SIGABRT)
	code := p.wait(t)
	dump := p.stderr.String()
	if code != 1 || !strings.Contains(dump, "goroutine profile: total ") || !strings.Contains(dump, "main.serve+") {
		t.Errorf("exit status %d, want 1 and where each goroutine was:\n%s", code, dump)
	}
	// Of each stack once, however many goroutines wait for connections.
	if n := strings.Count(dump, "\n"); n > 500 {
		t.Errorf("the dump has %d lines", n)
	} else {
		t.Logf("%d lines", n)
	}
}

// A health check in a container has no shell and no curl, only the relay itself.
func TestProcessSaysWhetherItIsHealthy(t *testing.T) {
	skipOnWindows(t)
	p := start(t)
	port := p.http[strings.LastIndex(p.http, ":")+1:]
	ask := func(args ...string) (code int, says string) {
		cmd := command(t, append([]string{"healthy"}, args...)...)
		out, _ := cmd.CombinedOutput()
		if files, err := os.ReadDir(cmd.Dir); err != nil || len(files) > 0 {
			t.Errorf("healthy left %v behind (%v)", files, err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	// It takes the flags of the relay itself, whatever else they say.
	for _, args := range [][]string{{"--http-port", port}, {"--http-port=" + port, "--max-clients=7", "--announce=203.0.113.7"}} {
		if code, says := ask(args...); code != 0 || says != "ok\n" {
			t.Errorf("healthy %q = %d, %q, want 0 and ok", args, code, says)
		}
	}
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, testRelay{info: p.bootstrap}, src, dst)
	s := openEcho(t, src, dst) // delays the stop
	p.Process.Signal(syscall.SIGTERM)
	eventually(t, "the relay says that it is about to stop", func() bool {
		code, says := ask("--http-port", port)
		return code == 1 && strings.Contains(says, `answers 503: "stopping"`)
	})
	s.Reset()
	p.wait(t)
	if code, says := ask("--http-port", port); code != 1 || !strings.Contains(says, "connection refused: the relay is not running") {
		t.Errorf("healthy = %d, %q, want 1, because nothing listens", code, says)
	}
	for _, args := range [][]string{{"--http-port=x"}, {"stray"}} {
		if code, says := ask(args...); code != 2 {
			t.Errorf("healthy %q = %d, %q, want 2", args, code, says)
		}
	}
}

// What an operator wrote is taken as it is, but he hears what is likely a mistake.
func TestProcessWarnsOfDoubtfulFlags(t *testing.T) {
	skipOnWindows(t)
	stop := func(p *process) *process {
		p.Process.Signal(syscall.SIGTERM)
		p.wait(t)
		return p
	}
	const small, itself, twice, memory = "--circuit-bytes is less", "--announce names this machine itself", "--announce has the same address", "max_clients exceeds what memory can hold"
	p := stop(start(t, "--circuit-bytes=1MiB", "--announce=127.0.0.1", "--announce=relay.example.org", "--announce=Relay.Example.org."))
	for _, want := range []string{small, itself, twice} {
		if p.stderr.line(want) == "" {
			t.Errorf("log lacks %q:\n%s", want, p.stderr)
		}
	}
	p = stop(start(t, "--circuit-bytes=16MiB", "--announce=203.0.113.7", "--announce=203.0.113.8"))
	for _, unwanted := range []string{small, itself, twice, memory} {
		if p.stderr.line(unwanted) != "" {
			t.Errorf("log has %q:\n%s", unwanted, p.stderr)
		}
	}
	cmd := command(t, "--port=0", "--http-port=0")
	cmd.Env = append(os.Environ(), "GOMEMLIMIT=20MiB")
	if p := stop(launch(t, cmd)); p.stderr.line(memory) == "" {
		t.Errorf("no warning that 64 clients take more than 20 MiB:\n%s", p.stderr)
	}
}

// Port forwarding of a container can hide where clients are. The operator hears of it,
// and nobody else does.
func TestOnePrivateAddressOfAllIsAMask(t *testing.T) {
	for _, tt := range []struct{ from, want string }{
		{"", ""},
		{"10.0.2.100", ""}, // one device proves nothing
		{"10.0.2.100 10.0.2.100", "10.0.2.100"},
		{"fd00::1 fd00::1 fd00::1", "fd00::1"},
		{"10.0.2.100 10.0.2.101", ""},
		{"10.0.2.100 203.0.113.7", ""},
		{"203.0.113.7 203.0.113.7", ""},
		{"127.0.0.1 127.0.0.1", ""},
	} {
		var from []netip.Addr
		for s := range strings.FieldsSeq(tt.from) {
			from = append(from, netip.MustParseAddr(s))
		}
		got := maskOf(from)
		if got.IsValid() != (tt.want != "") || got.IsValid() && got.String() != tt.want {
			t.Errorf("maskOf(%s) = %v, want %q", tt.from, got, tt.want)
		}
	}
}

// The journal knows the time of each line, and finds warnings by their priority.
func TestLogLinesFitTheJournal(t *testing.T) {
	var got strings.Builder
	log := slog.New(newLogHandler(&got, slog.LevelDebug, true)).With("k", 1).WithGroup("g")
	log.Debug("d")
	log.Info("i", "time", "x")
	log.Warn("w\nw")
	log.Error("e", "a", 2)
	const want = "<7>level=DEBUG msg=d k=1\n<6>level=INFO msg=i k=1 g.time=x\n<4>level=WARN msg=\"w\\nw\" k=1\n<3>level=ERROR msg=e k=1 g.a=2\n"
	if got.String() != want {
		t.Errorf("lines for the journal are\n%swant\n%s", &got, want)
	}
	if slog.New(newLogHandler(&got, slog.LevelInfo, true)).Enabled(t.Context(), slog.LevelDebug) {
		t.Error("debug lines are written without --verbose")
	}

	skipOnWindows(t)
	for _, journal := range []bool{true, false} {
		file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		stream := reflect.ValueOf(info.Sys()).Elem()
		cmd := command(t, "--identity="+t.TempDir())
		cmd.Stderr = file
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%v:%v", journalEnv, stream.FieldByName("Dev"), stream.FieldByName("Ino")))
		if !journal { // the variable is inherited, and stderr leads elsewhere
			cmd.Env[len(cmd.Env)-1] += "0"
		}
		cmd.Run()
		text, err := os.ReadFile(file.Name())
		if err != nil || strings.HasPrefix(string(text), "<3>privstack-relay: identity") != journal {
			t.Errorf("with the journal %v: stderr is %q, %v", journal, text, err)
		}
	}
}

// When something is wrong, the first lines of the log are what people are asked for.
func TestProcessTellsHowItRuns(t *testing.T) {
	skipOnWindows(t)
	p := start(t, "--max-clients=77", "--identity=mine.key")
	eventually(t, "the log has the sizes of the UDP buffers", func() bool { return p.stderr.line("udp buffers") != "" })
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	for _, tt := range []struct{ msg, says string }{
		{"new identity key made, keep a copy", "path=" + filepath.Join(p.Dir, "mine.key") + " mode=-rw-------"},
		{"relay ready", "peer=" + p.peerID + " listen=\"[/ip4/0.0.0.0/udp/"},
		{"relay ready", "announced=false"},
		{"limits", "max_clients=77 because_of=--max-clients max_clients_per_ip=256"},
		{"udp buffers", "receive_bytes="},
		{"udp buffers", "send_bytes="},
	} {
		if line := p.stderr.line(tt.msg); !strings.Contains(line, tt.says) {
			t.Errorf("log line %q, want one that says %s", line, tt.says)
		}
	}
	public := false
	for line := range strings.Lines(p.stdout) {
		if _, addr, ok := strings.Cut(line, "Bootstrap: "); ok {
			public = public || manet.IsPublicAddr(ma.StringCast(strings.TrimSpace(addr)))
		}
	}
	if warned := p.stderr.line("no announced address, and none of ours is public") != ""; warned == public {
		t.Errorf("warned that there is no public address: %v, with\n%s", warned, p.stdout)
	}
	if log := p.stderr.String(); strings.Contains(log, "buffer size") || strings.Contains(log, "metrics") {
		t.Errorf("the log has quic-go's own warning, or mentions metrics that nobody asked for:\n%s", log)
	}

	if p.stderr.line("max_clients exceeds what memory can hold") != "" {
		t.Errorf("warned that 77 clients take too much memory:\n%s", p.stderr)
	}

	p = start(t, "--max-clients=1000000")
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	if p.stderr.line("max_clients exceeds what memory can hold") == "" {
		t.Errorf("no warning that a million clients take too much memory:\n%s", p.stderr)
	}

	p = start(t, "--announce=203.0.113.7")
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	if line := p.stderr.line("limits"); !regexp.MustCompile(`because_of="[0-9]+ MiB of memory \((machine|cgroup|GOMEMLIMIT)\)"`).MatchString(line) {
		t.Errorf("log line %q, want one with the memory that was found", line)
	}
	if p.stderr.line("no announced address, and none of ours is public") != "" {
		t.Errorf("warned that there is no public address although one is announced:\n%s", p.stderr)
	}
}

// In a container the command fails, and the operator has to run it elsewhere.
func TestBufferAdviceFitsWhereItIsRead(t *testing.T) {
	const command = "sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000, then restart the relay"
	limit := "proc/sys/net/core/rmem_max"
	for _, tt := range []struct {
		name   string
		system string
		root   fstest.MapFS
		want   string
	}{
		{"a machine", "linux", fstest.MapFS{limit: {Mode: 0o644}}, ", run: " + command},
		{"a container", "linux", fstest.MapFS{".dockerenv": {}}, ", run on the host, outside the container: " + command},
		{"a container with the host's network", "linux", fstest.MapFS{limit: {Mode: 0o644}, "run/.containerenv": {}}, ", run on the host, outside the container: " + command},
		{"a network namespace of an old Linux", "linux", fstest.MapFS{}, ", run on the host, outside the container: " + command},
		{"a network namespace of Linux 6.18", "linux", fstest.MapFS{limit: {Mode: 0o444}}, ", run on the host, outside the container: " + command},
		{"elsewhere", "darwin", fstest.MapFS{}, ""},
	} {
		if got := bufferAdvice(tt.system, tt.root); got != tt.want {
			t.Errorf("%s: advice = %q, want %q", tt.name, got, tt.want)
		}
	}
}

// The address that the operator chose serves the metrics and nothing else.
func TestProcessServesMetrics(t *testing.T) {
	skipOnWindows(t)
	url := func(p *process) string {
		eventually(t, "metrics are served", func() bool { return p.stderr.line("metrics served") != "" })
		_, url, _ := strings.Cut(strings.TrimSpace(p.stderr.line("metrics served")), "url=")
		return url
	}
	p := start(t, "--metrics=127.0.0.1:0")
	for _, tt := range []struct {
		method, path string
		want         int
	}{{"GET", "", 200}, {"HEAD", "", 200}, {"POST", "", 405}, {"GET", "/more", 404}, {"GET", "/../", 404}, {"GET", "/../api/v1/identity", 404}} {
		req, err := http.NewRequest(tt.method, url(p)+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.want || tt.method == "GET" && tt.want == 200 != strings.Contains(string(body), "\nprivstack_relay_build_info{") {
			t.Errorf("%s %s = %d %.80q, want %d", tt.method, tt.path, resp.StatusCode, body, tt.want)
		}
	}
	if resp, err := http.Get(p.http + "/metrics"); err != nil || resp.StatusCode != 404 {
		t.Errorf("the identity endpoint serves metrics: %v, %v", resp, err)
	}
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d, want 0", code)
	}
	if p.stderr.line("metrics are not on loopback") != "" {
		t.Errorf("warned that strangers can read metrics on loopback:\n%s", p.stderr)
	}

	p = start(t, "--metrics=0.0.0.0:0")
	url(p)
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	if p.stderr.line("metrics are not on loopback") == "" {
		t.Errorf("no warning that strangers can read the metrics:\n%s", p.stderr)
	}
}

// With --verbose the libraries' log lines appear among ours, in the same format.
func TestVerboseJoinsLibraryLogs(t *testing.T) {
	skipOnWindows(t)
	p := start(t, "--verbose")
	c := newClient(t)
	serveKad(t, c)
	if err := c.Connect(testContext(t), p.bootstrap); err != nil {
		t.Fatal(err)
	}
	findNode(t, c, testRelay{info: p.bootstrap}, c.ID())
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	for line := range strings.Lines(p.stderr.String()) {
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("log line %q does not come from our handler", line)
		}
	}
	for _, want := range []string{`msg="new peer"`, `msg="dht `, "logger=net/identify "} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("the verbose log lacks %s", want)
		}
	}
}

// One part that hangs must not keep the process from ending.
func TestClosingGivesUpOnAPartThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		err := closeStep(t.Context(), "node", func(context.Context) error {
			<-hang
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), "close node") {
			t.Errorf("closeStep returned %v, want an error that names the part", err)
		}
		close(hang)
	})
	cause := errors.New("cause")
	if err := closeStep(t.Context(), "node", func(context.Context) error { return cause }); !errors.Is(err, cause) {
		t.Errorf("closeStep returned %v, want %v", err, cause)
	}
}
