package main

// What several test files share: waiting, the built binary as a process, a relay in
// this process, clients that are libp2p hosts, and requests to the DHT. Clients by
// the thousand are in lab_crowd_test.go, homes behind NATs in lab_nat_test.go.
//
// A helper that takes a testing.TB may end the test, so only the test's own
// goroutine calls it. What other goroutines call returns its error.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	quic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
)

// testTimeout is how long a test waits for something that should happen. It does not
// say how long that should take.
const testTimeout = 30 * time.Second

// testContext returns a context that ends after testTimeout, or with the test.
func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits until ok returns true, and fails the test if that takes longer than
// testTimeout.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	eventuallyWithin(t, testTimeout, what, ok)
}

func eventuallyWithin(t testing.TB, timeout time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(timeout)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v: %s", timeout, what)
		}
	}
}

// inParallel calls do for 0 to n-1 in as many goroutines as there are workers, and fails
// the test if any call failed.
func inParallel(t testing.TB, n, workers int, do func(ctx context.Context, i int) error) {
	t.Helper()
	var next, failed int
	var first error
	var mu sync.Mutex
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= n {
					return
				}
				ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
				err := do(ctx, i)
				cancel()
				if err != nil {
					mu.Lock()
					failed, first = failed+1, err
					mu.Unlock()
				}
			}
		})
	}
	working.Wait()
	if failed > 0 {
		t.Fatalf("%d of %d failed; one error is: %v", failed, n, first)
	}
}

// percentile returns the duration below which the share p of d is. It sorts d.
func percentile(d []time.Duration, p float64) time.Duration {
	slices.Sort(d)
	return d[min(int(float64(len(d))*p), len(d)-1)]
}

// buildDir is the directory of the built binary. TestMain makes and removes it.
var buildDir string

// buildBinary compiles the program, once for all tests, and returns its path.
var buildBinary = sync.OnceValues(func() (string, error) {
	name := filepath.Join(buildDir, "privstack-relay")
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	out, err := exec.Command("go", "build", "-o", name, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return name, nil
})

// TestMain runs the tests, or what the environment says that this process is instead: a
// relay to be measured, or a part of the NAT lab in one of its namespaces.
func TestMain(m *testing.M) {
	if kind := os.Getenv(benchRelayEnv); kind != "" {
		panic(runBenchRelay(kind, os.Args[1:]))
	}
	if delay := os.Getenv(labDelayEnv); delay != "" {
		panic(runLabDelay(delay, os.Stdout))
	}
	if relay := os.Getenv(labCrowdEnv); relay != "" {
		panic(runLabCrowd(relay, os.Stdin, os.Stdout))
	}
	if os.Getenv(labClientEnv) != "" {
		if err := runLabClient(os.Stdin, os.Stdout); err != nil {
			panic(err)
		}
		return
	}
	var err error
	if buildDir, err = os.MkdirTemp("", "privstack-relay-test-"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(buildDir)
	os.Exit(code)
}

// command returns the built binary with args, to be run in an empty directory.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	name, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Dir = t.TempDir()
	return cmd
}

// process is a relay that runs as a process.
type process struct {
	*exec.Cmd
	peerID    string
	bootstrap peer.AddrInfo // on loopback
	http      string        // base URL
	stdout    string        // the whole banner
	stderr    *logBuffer    // complete once wait has returned
	rest      chan string   // gets what follows the banner on stdout, once that is closed
}

// logBuffer collects what a process logs.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// line returns the first line with that msg, or "" if there is none yet.
func (b *logBuffer) line(msg string) string {
	for line := range strings.Lines(b.String()) {
		if strings.Contains(line, "msg="+msg+" ") || strings.Contains(line, `msg="`+msg) {
			return line
		}
	}
	return ""
}

// start runs the built binary on free ports, and returns when its banner is complete. The
// process ends with the test.
func start(t testing.TB, args ...string) *process {
	t.Helper()
	return launch(t, command(t, append([]string{"--port=0", "--http-port=0"}, args...)...))
}

// launch runs cmd, a relay, and returns when its banner is complete. The process ends with
// the test.
func launch(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{Cmd: cmd, stderr: new(logBuffer), rest: make(chan string, 1)}
	p.Stderr = p.stderr
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })

	lines := bufio.NewReader(stdout)
	for p.http == "" {
		line, err := lines.ReadString('\n')
		if err != nil {
			p.Cmd.Wait()
			t.Fatalf("no banner: %v\n%s", err, p.stderr)
		}
		p.stdout += line
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), ":"); key {
		case "PeerId":
			p.peerID = strings.TrimSpace(value)
		case "Bootstrap":
			info, err := peer.AddrInfoFromString(strings.TrimSpace(value))
			if err != nil {
				t.Fatalf("banner line %q: %v", line, err)
			}
			port, _ := info.Addrs[0].ValueForProtocol(ma.P_UDP)
			p.bootstrap = peer.AddrInfo{ID: info.ID, Addrs: []ma.Multiaddr{ma.StringCast("/ip4/127.0.0.1/udp/" + port + "/quic-v1")}}
		case "Identity":
			p.http = strings.TrimSuffix(strings.TrimSpace(value), identityRoute)
		}
	}
	go func() {
		rest, _ := io.ReadAll(lines)
		p.rest <- string(rest)
	}()
	return p
}

// wait waits for the process to end and returns its exit status, -1 for a signal.
func (p *process) wait(t *testing.T) int {
	t.Helper()
	timeout := time.AfterFunc(testTimeout, func() { p.Process.Kill() })
	rest := <-p.rest // first, because Wait closes the pipe
	p.Cmd.Wait()
	if !timeout.Stop() {
		t.Fatalf("the relay did not stop within %v\n%s", testTimeout, p.stderr)
	}
	if strings.TrimSpace(rest) != "" {
		t.Errorf("stdout after the banner: %q, want nothing", rest)
	}
	return p.ProcessState.ExitCode()
}

// kill ends the process at once.
func (p *process) kill() {
	p.Process.Kill()
	<-p.rest
	p.Cmd.Wait()
}

func skipOnWindows(t *testing.T) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no such signals")
	}
}

// cpu returns the CPU time of the process so far, all threads together, in steps of
// 10 ms.
func (p *process) cpu(t testing.TB) time.Duration { t.Helper(); return cpuOf(t, p.Process.Pid) }

// ownCPU returns the CPU time of this process, in which the clients are.
func ownCPU(t testing.TB) time.Duration { t.Helper(); return cpuOf(t, os.Getpid()) }

func cpuOf(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// The name, which may hold anything, ends at the last parenthesis. utime and stime
	// are the 14th and 15th field (proc_pid_stat(5)), in ticks of USER_HZ, which is 100.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// rss returns the resident memory of the process in bytes, and peakRSS the most it had.
func (p *process) rss(t testing.TB) int64 { t.Helper(); return p.status(t, "VmRSS:") }

func (p *process) peakRSS(t testing.TB) int64 { t.Helper(); return p.status(t, "VmHWM:") }

// status returns a figure of /proc/PID/status, in bytes.
func (p *process) status(t testing.TB, name string) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), name)
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

func newTestKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func peerIDOf(t testing.TB, key ed25519.PrivateKey) string {
	t.Helper()
	k, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

func newTestPeerID(t testing.TB) peer.ID {
	t.Helper()
	_, public, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// defaultConfig returns the configuration for args, on free ports.
func defaultConfig(t testing.TB, args ...string) config {
	t.Helper()
	cfg, err := parseFlags(append([]string{"--port=0", "--http-port=0"}, args...))
	if err != nil {
		t.Fatal(err)
	}
	// No test asks the DNS of this machine. Names in /etc/hosts are found.
	cfg.testOnlyResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no DNS in this test")
	}}
	return cfg
}

// testRelay is a relay in this process. info is how clients reach it on loopback.
type testRelay struct {
	*relay
	info peer.AddrInfo
}

// newTestRelay starts a relay with a new key. It is closed with the test.
func newTestRelay(t testing.TB, cfg config) testRelay {
	t.Helper()
	return newTestRelayWithin(t, newLimits(cfg.maxClients, cfg.maxClientsPerIP), cfg, newTestKey(t))
}

// newTestRelayWithin starts a relay with these limits and this key.
func newTestRelayWithin(t testing.TB, lim limits, cfg config, key ed25519.PrivateKey) testRelay {
	t.Helper()
	r, err := startRelayWithin(lim, cfg, key, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("startRelay: %v", err)
	}
	t.Cleanup(func() { r.close() })
	addr := ma.StringCast("/ip4/127.0.0.1/udp/" + listenPort(r) + "/quic-v1")
	return testRelay{r, peer.AddrInfo{ID: r.host.ID(), Addrs: []ma.Multiaddr{addr}}}
}

// listenPort returns the UDP port of r.
func listenPort(r *relay) string {
	port, _ := r.host.Network().ListenAddresses()[0].ValueForProtocol(ma.P_UDP)
	return port
}

// knows reports whether id is connected and has told the relay that it serves the DHT.
func (r testRelay) knows(id peer.ID) bool {
	r.peers.mu.Lock()
	defer r.peers.mu.Unlock()
	_, ok := r.peers.identified[id]
	return ok
}

// liveHeap returns the size of the live heap, in bytes.
func liveHeap() uint64 {
	runtime.GC()
	runtime.GC() // again, for what finalizers have released
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// newClient returns a libp2p host with QUIC, identify and the client side of the circuit
// relay, on a free port of 127.0.0.1. opts come after its own options.
func newClient(t testing.TB, opts ...libp2p.Option) host.Host {
	t.Helper()
	h, err := libp2p.New(append([]libp2p.Option{
		libp2p.Transport(quic.NewTransport),
		libp2p.ListenAddrStrings("/ip4/127.0.0.1/udp/0/quic-v1"),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.ProtocolVersion("/privstack/sync/1.0.0"),
		libp2p.UserAgent("PrivStack/test"),
		libp2p.EnableRelay(),
		libp2p.DisableMetrics(),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// serveKad makes h a DHT server with an empty routing table, as every fresh client is.
func serveKad(t testing.TB, h host.Host) *dht.IpfsDHT {
	t.Helper()
	d, err := dht.New(h,
		dht.Mode(dht.ModeServer),
		dht.ProtocolPrefix("/privstack"),
		dht.V1ProtocolOverride(kadProtocol),
		dht.Validator(newestWins{}),
		dht.DisableAutoRefresh(),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// connect connects h to r.
func connect(t testing.TB, h host.Host, r testRelay) {
	t.Helper()
	if err := h.Connect(testContext(t), r.info); err != nil {
		t.Fatalf("connect to the relay: %v", err)
	}
}

// admits connects clients one by one until r refuses one, or until there are that many.
// It returns those that r let in.
func admits(t *testing.T, r testRelay, most int) (in []host.Host) {
	t.Helper()
	for range most {
		c := newClient(t)
		err := c.Connect(testContext(t), r.info)
		if err == nil {
			// A client that is refused after the handshake notices when it asks first.
			_, err = tryAsk(testContext(t), c, r, kadpb.NewMessage(kadpb.Message_PING, nil, 0))
		}
		if err != nil {
			break
		}
		in = append(in, c)
	}
	return in
}

// observed returns the address at which the relay sees h.
func observed(t testing.TB, h host.Host, r testRelay) ma.Multiaddr {
	t.Helper()
	conns := r.host.Network().ConnsToPeer(h.ID())
	if len(conns) != 1 {
		t.Fatalf("relay has %d connections to the client, want 1", len(conns))
	}
	return conns[0].RemoteMultiaddr()
}

// circuitBetween makes a reservation for dst and connects src to it through the relay. dst
// echoes what src sends on streams of echoProtocol.
func circuitBetween(t testing.TB, r testRelay, src, dst host.Host) {
	t.Helper()
	connect(t, src, r)
	connect(t, dst, r)
	if _, err := circuitclient.Reserve(testContext(t), dst, r.info); err != nil {
		t.Fatalf("reserve: %v", err)
	}
	dst.SetStreamHandler(echoProtocol, func(s network.Stream) {
		defer s.Close()
		io.Copy(s, s)
	})
	via := ma.StringCast(r.info.Addrs[0].String() + "/p2p/" + r.info.ID.String() + "/p2p-circuit")
	if err := src.Connect(testContext(t), peer.AddrInfo{ID: dst.ID(), Addrs: []ma.Multiaddr{via}}); err != nil {
		t.Fatalf("connect through the relay: %v", err)
	}
}

const echoProtocol = "/test/echo/1.0.0"

// openEcho opens a stream that dst echoes, over a circuit.
func openEcho(t testing.TB, src, dst host.Host) network.Stream {
	t.Helper()
	s, err := src.NewStream(network.WithAllowLimitedConn(testContext(t), "test"), dst.ID(), echoProtocol)
	if err != nil {
		t.Fatalf("stream over the circuit: %v", err)
	}
	if _, err := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT); err != nil {
		t.Fatalf("stream runs over %v, want a circuit", s.Conn().RemoteMultiaddr())
	}
	return s
}

// ask sends a DHT request to the relay and returns the answer.
func ask(t testing.TB, h host.Host, r testRelay, req *kadpb.Message) *kadpb.Message {
	t.Helper()
	resp, err := tryAsk(testContext(t), h, r, req)
	if err != nil {
		t.Fatalf("ask %v: %v", req.Type, err)
	}
	return resp
}

// tryAsk sends a DHT request to the relay and returns the answer, or what went wrong.
func tryAsk(ctx context.Context, h host.Host, r testRelay, req *kadpb.Message) (*kadpb.Message, error) {
	s, err := h.NewStream(ctx, r.info.ID, kadProtocol)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	if _, err := protodelim.MarshalTo(s, req); err != nil {
		return nil, err
	}
	if err := s.CloseWrite(); err != nil {
		return nil, err
	}
	resp := new(kadpb.Message)
	return resp, protodelim.UnmarshalFrom(&byteReader{Reader: s}, resp)
}

// byteReader reads single bytes and buffers nothing.
type byteReader struct{ io.Reader }

func (r *byteReader) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r.Reader, b[:])
	return b[0], err
}

// findNode asks the relay for id and returns the addresses in the answer.
func findNode(t testing.TB, h host.Host, r testRelay, id peer.ID) (addrs []ma.Multiaddr, found bool) {
	t.Helper()
	resp := ask(t, h, r, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(id), 0))
	for _, p := range resp.CloserPeers {
		if peer.ID(p.Id) == id {
			return p.Addresses(), true
		}
	}
	return nil, false
}

// waitFound waits until the relay's answer names id, and returns the addresses.
func waitFound(t testing.TB, h host.Host, r testRelay, id peer.ID) (addrs []ma.Multiaddr) {
	t.Helper()
	eventually(t, "FIND_NODE names "+id.String(), func() bool {
		var found bool
		addrs, found = findNode(t, h, r, id)
		return found
	})
	return addrs
}

// put stores a record at the relay.
func put(t testing.TB, h host.Host, r testRelay, rec *recpb.Record) error {
	t.Helper()
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, rec.Key, 0)
	req.Record = rec
	_, err := tryAsk(testContext(t), h, r, req)
	return err
}

// get returns the record that the relay has for key, or nil.
func get(t testing.TB, h host.Host, r testRelay, key []byte) *recpb.Record {
	t.Helper()
	return ask(t, h, r, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0)).Record
}

// findMessage, getMessage and putMessage return the requests that clients make.
func findMessage(key []byte) *kadpb.Message { return kadpb.NewMessage(kadpb.Message_FIND_NODE, key, 0) }

func getMessage(key []byte) *kadpb.Message { return kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0) }

func putMessage(key []byte, publisher peer.ID) *kadpb.Message {
	m := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	m.Record = rustRecord(key, "{}", publisher, 60)
	return m
}

// groupKey is a record key as clients make it, from the raw bytes of a hash. Some of these
// are slashes, zeros, or no UTF-8.
var groupKey = append([]byte("/privstack/syncgroup/"),
	0x00, '/', 0xff, 0xfe, '/', '/', 0x80, 0x01, 2, 3, 4, 5, 6, 7, 8, 9,
	10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 0xff)

// newGroupKey returns the key of a group that nobody else is in.
func newGroupKey() []byte {
	hash := make([]byte, 32)
	rand.Read(hash)
	return append([]byte("/privstack/syncgroup/"), hash...)
}

// rustRecord returns a record as rust-libp2p sends it, with the two fields that it adds.
func rustRecord(key []byte, value string, publisher peer.ID, ttl uint64) *recpb.Record {
	rec := &recpb.Record{Key: key, Value: []byte(value)}
	rec.ProtoReflect().SetUnknown(rustFields(publisher, ttl))
	return rec
}

// rustFields returns a record's publisher and ttl as rust-libp2p encodes them. ttl is in
// seconds.
func rustFields(publisher peer.ID, ttl uint64) []byte {
	b := protowire.AppendTag(nil, 666, protowire.BytesType)
	b = protowire.AppendBytes(b, []byte(publisher))
	b = protowire.AppendTag(b, 777, protowire.VarintType)
	return protowire.AppendVarint(b, ttl)
}

// memoryStream is a network.Stream that can only be read.
type memoryStream struct {
	network.Stream
	io.Reader
}

func (s memoryStream) Read(p []byte) (int, error) { return s.Reader.Read(p) }
func (memoryStream) Scope() network.StreamScope   { return &network.NullScope{} }
func (memoryStream) Conn() network.Conn           { return notQUIC{} }

// notQUIC is a connection that no budget is for.
type notQUIC struct{ network.Conn }

func (notQUIC) As(any) bool { return false }
