package main

// The NAT lab: the built relay, homes behind NAT routers, and clients that know only the
// relay. Each is in a network namespace of its own on this machine, and no namespace has a
// way out to a real network. The lab needs root, ip (iproute2) and nft (nftables), and its
// tests are skipped without them.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	quic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// lab is an internet: one bridge that joins all hosts with public addresses.
type lab struct {
	t    testing.TB
	inet string // the bridge's namespace
}

// labNames numbers namespaces and bridge ports, so that each has its own name.
var labNames atomic.Int32

func newLab(t testing.TB) *lab {
	t.Helper()
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("the NAT lab needs Linux and root, for network namespaces")
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("the NAT lab needs %s: apt-get install iproute2 nftables", tool)
		}
	}
	if out, err := exec.Command("unshare", "--net", "true").CombinedOutput(); err != nil {
		t.Skipf("no network namespaces here: %v: %s", err, out)
	}
	l := &lab{t: t}
	l.inet = l.namespace("inet")
	l.in(l.inet, "ip link add br0 type bridge", "ip link set br0 up")
	return l
}

func (l *lab) namespace(name string) string {
	l.t.Helper()
	ns := fmt.Sprintf("relaylab%d-%d-%s", os.Getpid(), labNames.Add(1), name)
	l.run("ip", "netns", "add", ns)
	l.t.Cleanup(func() { exec.Command("ip", "netns", "del", ns).Run() })
	l.in(ns, "ip link set lo up")
	return ns
}

func (l *lab) run(name string, args ...string) {
	l.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		l.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// in runs commands in a namespace.
func (l *lab) in(ns string, commands ...string) {
	l.t.Helper()
	for _, c := range commands {
		words := strings.Fields(c)
		if words[0] == "ip" { // it enters the namespace by itself
			l.run("ip", append([]string{"-netns", ns}, words[1:]...)...)
			continue
		}
		l.run("ip", append([]string{"netns", "exec", ns}, words...)...)
	}
}

// attach connects ns to the bridge in the namespace sw, by an interface dev with addrs. It
// returns the name of the bridge's port.
func (l *lab) attach(ns, dev, sw string, addrs ...string) (port string) {
	l.t.Helper()
	port = fmt.Sprintf("port%d", labNames.Add(1))
	l.run("ip", "link", "add", port, "netns", sw, "type", "veth", "peer", "name", dev, "netns", ns)
	l.in(sw, "ip link set "+port+" master br0 up")
	l.up(ns, dev, addrs...)
	return port
}

// up brings an interface up and gives it addresses.
func (l *lab) up(ns, dev string, addrs ...string) {
	l.t.Helper()
	l.in(ns, "ip link set "+dev+" up")
	for _, addr := range addrs {
		nodad := ""
		if strings.Contains(addr, ":") {
			nodad = " nodad"
		}
		l.in(ns, "ip addr add "+addr+" dev "+dev+nodad)
	}
}

// public makes a host with public addresses. They are from 11.0.0.0/8 and 2a00::/16,
// because libp2p does not take addresses for documentation as public.
func (l *lab) public(name string, addrs ...string) string {
	l.t.Helper()
	ns := l.namespace(name)
	l.attach(ns, "wan", l.inet, addrs...)
	return ns
}

// natKind is how a router maps and filters, as nft writes it.
type natKind string

const (
	// endpointIndependent keeps the port, so the mapping is the same for every
	// destination. Only hosts to which a packet was sent can answer.
	endpointIndependent natKind = "masquerade"

	// endpointDependent ("symmetric") takes another random port for each destination.
	endpointDependent natKind = "masquerade fully-random"
)

// router makes a NAT router with the public address wan and a LAN, in which it has the
// address 192.168.1.1.
func (l *lab) router(name, wan string, kind natKind) string {
	l.t.Helper()
	return l.routerOn(l.inet, name, wan, "192.168.1.1/24", kind)
}

// routerOn is router with its outside attached to the bridge of sw, which may be
// another router's LAN, and its inside where lan says.
func (l *lab) routerOn(sw, name, wan, lan string, kind natKind) string {
	l.t.Helper()
	ns := l.namespace(name)
	l.attach(ns, "wan", sw, wan)
	l.in(ns, "ip link add br0 type bridge", "ip addr add "+lan+" dev br0", "ip link set br0 up", "sysctl -qw net.ipv4.ip_forward=1")
	// Unsolicited packets are dropped early. Otherwise conntrack would take them for the
	// router's own, and a client's mapping could not have their port.
	l.nft(ns, `
		table ip lab {
			chain outgoing { type nat hook postrouting priority srcnat; oifname "wan" `+string(kind)+`; }
			chain incoming { type filter hook input priority filter; iifname "wan" meta l4proto udp drop; }
			chain forwarded {
				type filter hook forward priority filter; policy drop;
				iifname "br0" accept
				ct state established,related accept
				ct status dnat accept
			}
		}`)
	return ns
}

func (l *lab) nft(ns, rules string) {
	l.t.Helper()
	cmd := exec.Command("ip", "netns", "exec", ns, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("nft: %v\n%s", err, out)
	}
}

// home makes a host in a router's LAN.
func (l *lab) home(name, router string, host int) string {
	l.t.Helper()
	ns := l.namespace(name)
	l.attach(ns, "lan", router, fmt.Sprintf("192.168.1.%d/24", host))
	l.in(ns, "ip route add default via 192.168.1.1")
	return ns
}

// isolatedHome makes a host in a router's LAN that reaches nobody there but the router.
func (l *lab) isolatedHome(name, router string, host int) string {
	l.t.Helper()
	ns := l.namespace(name)
	port := l.attach(ns, "lan", router, fmt.Sprintf("192.168.1.%d/24", host))
	l.in(ns, "ip route add default via 192.168.1.1")
	l.in(router, "bridge link set dev "+port+" isolated on")
	return ns
}

// relay runs the built binary in ns. reach are the addresses that clients are given.
func (l *lab) relay(ns string, reach []string, args ...string) peer.AddrInfo {
	l.t.Helper()
	return l.relayOf(l.relayCommand(ns, args...), reach)
}

// labRelayBinaryEnv names another relay for the lab, to compare.
const labRelayBinaryEnv = "PRIVSTACK_LAB_RELAY_BINARY"

// relayCommand is the built binary, to be run in ns on the usual ports.
func (l *lab) relayCommand(ns string, args ...string) *exec.Cmd {
	l.t.Helper()
	args = append([]string{"--port=4001", "--http-port=4002"}, args...)
	var cmd *exec.Cmd
	if other := os.Getenv(labRelayBinaryEnv); other != "" {
		cmd = exec.Command(other, args...)
		cmd.Dir = l.t.TempDir()
	} else {
		cmd = command(l.t, args...)
	}
	cmd.Args = append([]string{"ip", "netns", "exec", ns}, cmd.Args...)
	cmd.Path, _ = exec.LookPath("ip")
	return cmd
}

// relayOf starts cmd, which has to print a relay's banner.
func (l *lab) relayOf(cmd *exec.Cmd, reach []string) peer.AddrInfo {
	l.t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGKILL)
		cmd.Wait()
		if l.t.Failed() {
			l.t.Logf("relay:\n%s", &stderr)
		}
	})
	lines := bufio.NewReader(stdout)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			cmd.Wait()
			l.t.Fatalf("relay did not start: %v\n%s", err, &stderr)
		}
		if id, ok := strings.CutPrefix(line, "  PeerId:    "); ok {
			go io.Copy(io.Discard, lines) // ends with the process
			pid, err := peer.Decode(strings.TrimSpace(id))
			if err != nil {
				l.t.Fatal(err)
			}
			info := peer.AddrInfo{ID: pid}
			for _, addr := range reach {
				info.Addrs = append(info.Addrs, ma.StringCast(addr))
			}
			return info
		}
	}
}

// far makes a host with public addresses at the end of a wire that adds rtt to each
// round trip and, at random, up to jitter to each packet, so that they overtake one
// another. (Kernels that come without netem are why it is not tc.)
func (l *lab) far(name string, rtt, jitter time.Duration, addrs ...string) string {
	l.t.Helper()
	wire, ns := l.namespace("wire"), l.namespace(name)
	l.attach(wire, "near", l.inet)
	l.in(wire, "ip link add far type veth peer name wan netns "+ns)
	l.up(wire, "far")
	l.up(ns, "wan", addrs...)
	cmd := l.self(wire, fmt.Sprintf("%s=%v %v", labDelayEnv, rtt, jitter))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	l.start(cmd)
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		l.t.Fatalf("the wire did not start: %v", err)
	}
	return ns
}

// labDelayEnv tells the test binary that it is a wire.
const labDelayEnv = "PRIVSTACK_LAB_DELAY"

// labClient is a client that runs as a process in a namespace. Its methods send requests to
// that process.
type labClient struct {
	t     testing.TB
	name  string
	id    peer.ID
	addrs []string   // at which it listens
	mu    sync.Mutex // one request at a time
	enc   *json.Encoder
	dec   *json.Decoder
}

// labRequest and labResponse are JSON lines between the test and its clients.
type labRequest struct {
	Do    string         // join, find, dial, known, reserve, circuit, direct, bridge, sync, put, get, identity, hangup
	Peer  *peer.AddrInfo `json:",omitempty"`
	Relay *peer.AddrInfo `json:",omitempty"`
	Bytes int64          `json:",omitempty"`
	URL   string         `json:",omitempty"`
}

type labResponse struct {
	ID      peer.ID  `json:",omitempty"`
	Addrs   []string `json:",omitempty"`
	Circuit bool     `json:",omitempty"` // the connection was a circuit
	Millis  int64
	Err     string `json:",omitempty"`
}

// self returns a command that runs this test binary in ns, as what env says.
func (l *lab) self(ns, env string) *exec.Cmd {
	l.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", ns, exe)
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = os.Stderr
	return cmd
}

// start runs cmd until the test ends.
func (l *lab) start(cmd *exec.Cmd) {
	l.t.Helper()
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
}

// client starts a client in ns and connects it to the relay.
func (l *lab) client(ns string, relay peer.AddrInfo) *labClient {
	l.t.Helper()
	c := l.labClient(ns)
	if err := c.join(relay); err != nil {
		l.t.Fatalf("%s: join: %v", ns, err)
	}
	return c
}

// join connects the client to the relay.
func (c *labClient) join(relay peer.AddrInfo) error {
	resp, err := c.try(labRequest{Do: "join", Relay: &relay})
	c.id, c.addrs = resp.ID, resp.Addrs
	return err
}

func (l *lab) labClient(ns string) *labClient { l.t.Helper(); return l.labClientOf(ns, "punching") }

// labClientOf starts a client that is "punching", or "plain": such a one meets others
// over the bridge.
func (l *lab) labClientOf(ns, kind string) *labClient {
	l.t.Helper()
	enc, dec := l.talk(ns, labClientEnv+"="+kind)
	return &labClient{t: l.t, name: ns, enc: enc, dec: dec}
}

// talk runs self, and returns its standard input and output.
func (l *lab) talk(ns, env string) (*json.Encoder, *json.Decoder) {
	l.t.Helper()
	cmd := l.self(ns, env)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	l.start(cmd)
	return json.NewEncoder(stdin), json.NewDecoder(stdout)
}

func (c *labClient) try(req labRequest) (resp labResponse, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.enc.Encode(req); err != nil {
		return resp, err
	}
	if err := c.dec.Decode(&resp); err != nil {
		return resp, err
	}
	if resp.Err != "" {
		return resp, errors.New(resp.Err)
	}
	return resp, nil
}

func (c *labClient) must(req labRequest) labResponse {
	c.t.Helper()
	resp, err := c.try(req)
	if err != nil {
		c.t.Fatalf("%s: %s: %v", c.name, req.Do, err)
	}
	return resp
}

// labClientEnv tells the test binary that it is a lab client.
const labClientEnv = "PRIVSTACK_LAB_CLIENT"

// runLabClient runs a client: a libp2p host with the deployed clients' protocols. It does
// what in asks, until in ends.
func runLabClient(in io.Reader, out io.Writer) error {
	var sockets quicSockets // whose packets are small, as the deployed clients' are where they must be
	punching := libp2p.EnableHolePunching()
	if os.Getenv(labClientEnv) == "plain" {
		punching = libp2p.ChainOptions()
	}
	h, err := libp2p.New(
		libp2p.Transport(quic.NewTransport),
		libp2p.QUICReuse(sockets.newManager),
		libp2p.NoListenAddrs,
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.ProtocolVersion("/privstack/sync/1.0.0"),
		libp2p.UserAgent("PrivStack/lab"),
		libp2p.EnableRelay(),
		punching,
		libp2p.DisableMetrics(),
		// Far longer than a dial takes here.
		libp2p.SwarmOpts(swarm.WithDialTimeout(10*time.Second)),
	)
	if err != nil {
		return err
	}
	defer sockets.close()
	defer h.Close()
	err = errors.Join(sockets.bind("udp4", 5001), sockets.bind("udp6", 5001),
		h.Network().Listen(ma.StringCast("/ip4/0.0.0.0/udp/5001/quic-v1"), ma.StringCast("/ip6/::/udp/5001/quic-v1")))
	if err != nil {
		return err
	}
	h.SetStreamHandler(kadProtocol, func(s network.Stream) { s.Reset() }) // identify only has to list it
	h.SetStreamHandler(digestProtocol, func(s network.Stream) {
		defer s.Close()
		hash := sha256.New()
		if _, err := io.Copy(hash, s); err == nil {
			s.Write(hash.Sum(nil))
		}
	})
	var relay peer.AddrInfo
	dec, enc := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var req labRequest
		if err := dec.Decode(&req); err != nil {
			return nil
		}
		if req.Relay != nil {
			relay = *req.Relay
			h.ConnManager().Protect(relay.ID, "lab")
		}
		began := time.Now()
		resp, err := labDo(h, relay, req)
		resp.Millis = time.Since(began).Milliseconds()
		if err != nil {
			resp.Err = err.Error()
		}
		if err := enc.Encode(resp); err != nil {
			return err
		}
	}
}

const digestProtocol = "/test/digest/1.0.0"

func labDo(h host.Host, relay peer.AddrInfo, req labRequest) (resp labResponse, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	switch req.Do {
	case "join":
		resp.ID = h.ID()
		for _, a := range h.Addrs() {
			if !manet.IsIPLoopback(a) {
				resp.Addrs = append(resp.Addrs, a.String())
			}
		}
		return resp, h.Connect(ctx, relay)
	case "find":
		m, err := tryAsk(ctx, h, testRelay{info: relay}, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(req.Peer.ID), 0))
		if err != nil {
			return resp, err
		}
		for _, p := range m.CloserPeers {
			if peer.ID(p.Id) == req.Peer.ID {
				resp.Addrs = strs(p.Addresses())
			}
		}
		return resp, nil
	case "dial":
		// Dial these addresses only, and none that an earlier step has left behind.
		h.Peerstore().ClearAddrs(req.Peer.ID)
		h.Peerstore().AddAddrs(req.Peer.ID, req.Peer.Addrs, peerstore.TempAddrTTL)
		h.Network().(*swarm.Swarm).Backoff().Clear(req.Peer.ID)
		ctx, cancel := context.WithTimeout(network.WithForceDirectDial(ctx, "lab"), 6*time.Second)
		defer cancel()
		_, err := h.Network().DialPeer(ctx, req.Peer.ID)
		return resp, err
	case "reserve":
		res, err := circuitclient.Reserve(ctx, h, peer.AddrInfo{ID: relay.ID})
		if err == nil {
			resp.Addrs = strs(res.Addrs)
		}
		return resp, err
	case "known":
		resp.Addrs = strs(h.Peerstore().Addrs(relay.ID))
		return resp, nil
	case "circuit":
		via := ma.StringCast(fmt.Sprintf("%s/p2p/%s/p2p-circuit", h.Network().ConnsToPeer(relay.ID)[0].RemoteMultiaddr(), relay.ID))
		h.Network().(*swarm.Swarm).Backoff().Clear(req.Peer.ID)
		return resp, h.Connect(ctx, peer.AddrInfo{ID: req.Peer.ID, Addrs: []ma.Multiaddr{via}})
	case "direct":
		// Wait until hole punching has made a direct connection, or should have long ago.
		sub, err := h.EventBus().Subscribe(new(event.EvtPeerConnectednessChanged))
		if err != nil {
			return resp, err
		}
		defer sub.Close()
		giveUp := time.After(15 * time.Second)
		for h.Network().Connectedness(req.Peer.ID) != network.Connected {
			select {
			case <-sub.Out():
			case <-giveUp:
				return resp, errors.New("no direct connection")
			}
		}
		return resp, nil
	case "sync":
		s, err := h.NewStream(network.WithAllowLimitedConn(ctx, "lab"), req.Peer.ID, digestProtocol)
		if err != nil {
			return resp, err
		}
		defer s.Reset()
		_, circuitErr := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT)
		resp.Circuit = circuitErr == nil
		s.SetDeadline(time.Now().Add(2 * time.Minute))
		sent, got := sha256.New(), make([]byte, sha256.Size)
		if _, err := io.CopyN(io.MultiWriter(s, sent), rand.NewChaCha8([32]byte{}), req.Bytes); err != nil {
			return resp, err
		}
		if err := s.CloseWrite(); err != nil {
			return resp, err
		}
		if _, err := io.ReadFull(s, got); err != nil {
			return resp, err
		}
		if !bytes.Equal(got, sent.Sum(nil)) {
			return resp, errors.New("the digest differs")
		}
		return resp, nil
	case "put", "get":
		m := kadpb.NewMessage(map[string]kadpb.Message_MessageType{"put": kadpb.Message_PUT_VALUE, "get": kadpb.Message_GET_VALUE}[req.Do], groupKey, 0)
		if req.Do == "put" {
			m.Record = rustRecord(groupKey, h.ID().String(), h.ID(), 7200)
		}
		m, err := tryAsk(ctx, h, testRelay{info: relay}, m)
		if err != nil {
			return resp, err
		}
		resp.ID, err = peer.Decode(string(m.GetRecord().GetValue()))
		return resp, err
	case "bridge":
		// Dial the last address that the answer to "get" names.
		m, err := tryAsk(ctx, h, testRelay{info: relay}, getMessage(groupKey))
		if err != nil {
			return resp, err
		}
		for _, p := range m.CloserPeers {
			if addrs := p.Addresses(); peer.ID(p.Id) == req.Peer.ID {
				return resp, h.Connect(ctx, peer.AddrInfo{ID: req.Peer.ID, Addrs: addrs[len(addrs)-1:]})
			}
		}
		return resp, errors.New("the mate is not named")
	case "identity":
		answer, err := http.Get(req.URL)
		if err != nil {
			return resp, err
		}
		defer answer.Body.Close()
		var identity identityResponse
		if err := json.NewDecoder(answer.Body).Decode(&identity); err != nil {
			return resp, err
		}
		resp.ID, err = peer.Decode(identity.PeerID)
		return resp, err
	case "hangup":
		// Forget failed dials, too: the next are to be made at once.
		h.Network().(*swarm.Swarm).Backoff().Clear(req.Peer.ID)
		return resp, h.Network().ClosePeer(req.Peer.ID)
	}
	return resp, fmt.Errorf("unknown request %q", req.Do)
}

// addrsOf returns the addresses with which the relay names mate, once mate has reported
// its own.
func (c *labClient) addrsOf(mate *labClient) (direct []ma.Multiaddr) {
	c.t.Helper()
	eventually(c.t, c.name+" finds "+mate.name, func() bool {
		resp := c.must(labRequest{Do: "find", Peer: &peer.AddrInfo{ID: mate.id}})
		direct = nil
		for _, addr := range resp.Addrs {
			direct = append(direct, ma.StringCast(addr))
		}
		return !slices.ContainsFunc(mate.addrs, func(own string) bool { return !slices.Contains(resp.Addrs, own) })
	})
	return direct
}

// route is in which ways two clients reached each other.
type route struct {
	observed bool  // each is named with its NAT's outside address first
	dial     bool  // one dials the addresses it was told
	crossing bool  // both dial at once, as clients do every 30 s
	circuit  bool  // a circuit through the relay
	punched  bool  // hole punching (DCUtR) made a direct connection
	direct   bool  // 16 MiB went over a direct connection, not the circuit
	millis   int64 // how long the 16 MiB took
}

func (p route) String() string {
	mark := func(b bool) string {
		if b {
			return "yes"
		}
		return "no"
	}
	via := "circuit"
	if p.direct {
		via = "direct"
	}
	return fmt.Sprintf("%s\t| %s\t| %s\t| %s\t| %s\t| %s, %.1f s\t|", mark(p.observed), mark(p.dial), mark(p.crossing), mark(p.circuit), mark(p.punched), via, float64(p.millis)/1000)
}

// meet tries all ways in which two clients can reach each other. They have five tries to
// punch a hole and sync, because go-libp2p does not try again when its packets came too
// late to cross, and closes one of two direct connections that both have made.
func meet(a, b *labClient, aOutside, bOutside string, canPunch bool) (p route) {
	a.t.Helper()
	aAddrs, bAddrs := b.addrsOf(a), a.addrsOf(b)
	p.observed = strings.HasPrefix(aAddrs[0].String(), aOutside) && strings.HasPrefix(bAddrs[0].String(), bOutside)
	dialB := labRequest{Do: "dial", Peer: &peer.AddrInfo{ID: b.id, Addrs: bAddrs}}
	dialA := labRequest{Do: "dial", Peer: &peer.AddrInfo{ID: a.id, Addrs: aAddrs}}
	hangup := func() {
		a.must(labRequest{Do: "hangup", Peer: &peer.AddrInfo{ID: b.id}})
		b.must(labRequest{Do: "hangup", Peer: &peer.AddrInfo{ID: a.id}})
	}

	_, err := a.try(dialB)
	p.dial = err == nil
	hangup()

	crossed := make(chan error)
	go func() { _, err := a.try(dialB); crossed <- err }()
	go func() { _, err := b.try(dialA); crossed <- err }()
	errA, errB := <-crossed, <-crossed
	p.crossing = errA == nil || errB == nil
	hangup()

	b.must(labRequest{Do: "reserve"})
	if _, err := a.try(labRequest{Do: "circuit", Peer: &peer.AddrInfo{ID: b.id}}); err != nil {
		a.t.Errorf("%s to %s: circuit: %v", a.name, b.name, err)
		return p
	}
	p.circuit = true
	synced := false
	for range 5 {
		_, err = a.try(labRequest{Do: "direct", Peer: &peer.AddrInfo{ID: b.id}})
		p.punched = err == nil
		resp, err := a.try(labRequest{Do: "sync", Peer: &peer.AddrInfo{ID: b.id}, Bytes: 16 << 20})
		if err != nil {
			a.t.Logf("%s to %s: sync: %v", a.name, b.name, err)
		}
		synced = err == nil
		p.direct, p.millis = synced && !resp.Circuit, resp.Millis
		if p.direct || !canPunch && synced {
			break
		}
		hangup()
		if _, err := a.try(labRequest{Do: "circuit", Peer: &peer.AddrInfo{ID: b.id}}); err != nil {
			a.t.Errorf("%s to %s: circuit, again: %v", a.name, b.name, err)
		}
	}
	if !synced {
		a.t.Errorf("%s to %s: no sync in five tries", a.name, b.name)
	}
	return p
}

const (
	relayV4 = "/ip4/11.0.0.1/udp/4001/quic-v1"
	relayV6 = "/ip6/2a00:1::1/udp/4001/quic-v1"
)

// What the relay promises, where it is hardest: homes behind every kind of NAT meet.
func TestHomesMeetAcrossNATs(t *testing.T) {
	l := newLab(t)
	relay := l.relay(l.public("relay", "11.0.0.1/8", "2a00:1::1/64"), []string{relayV4, relayV6})
	tests := []struct {
		name  string
		a, b  string // a natKind, "public", "IPv6 only" or "same home"
		wants route  // its millis do not count
	}{
		{"both endpoint-independent", string(endpointIndependent), string(endpointIndependent),
			route{observed: true, crossing: true, circuit: true, punched: true, direct: true}},
		{"endpoint-independent, symmetric", string(endpointIndependent), string(endpointDependent),
			route{observed: true, circuit: true}},
		{"symmetric, endpoint-independent", string(endpointDependent), string(endpointIndependent),
			route{observed: true, circuit: true}},
		{"both symmetric", string(endpointDependent), string(endpointDependent),
			route{observed: true, circuit: true}},
		{"symmetric, public address", string(endpointDependent), "public",
			route{observed: true, dial: true, crossing: true, circuit: true, punched: true, direct: true}},
		{"public address, symmetric", "public", string(endpointDependent),
			route{observed: true, crossing: true, circuit: true, punched: true, direct: true}},
		{"IPv6 only, public address", "IPv6 only", "public",
			route{observed: true, dial: true, crossing: true, circuit: true, punched: true, direct: true}},
		{"IPv6 only, symmetric", "IPv6 only", string(endpointDependent),
			route{observed: true, circuit: true}},
		{"two in one home", string(endpointIndependent), "same home",
			route{observed: true, dial: true, crossing: true, circuit: true, punched: true, direct: true}},
	}
	var table strings.Builder
	rows := make([]string, len(tests))
	var running sync.WaitGroup
	for i, tt := range tests {
		running.Go(func() {
			t.Run(tt.name, func(t *testing.T) {
				sub := &lab{t: t, inet: l.inet}
				var router string
				place := func(kind string, side int) (ns, outside string) {
					name := fmt.Sprintf("%d%c", i, 'a'+side)
					switch kind {
					case "public":
						addr := fmt.Sprintf("11.1.%d.%d", i, side+1)
						return sub.public(name, addr+"/8", fmt.Sprintf("2a00:1::1:%x/64", 16*i+side)), "/ip"
					case "IPv6 only":
						addr := fmt.Sprintf("2a00:1::2:%x", 16*i+side)
						return sub.public(name, addr+"/64"), "/ip6/" + addr + "/udp/"
					case "same home":
						return sub.home(name, router, 11), fmt.Sprintf("/ip4/11.2.%d.1/udp/", i)
					}
					wan := fmt.Sprintf("11.2.%d.%d", i, side+1)
					router = sub.router(name+"r", wan+"/8", natKind(kind))
					return sub.home(name, router, 10), "/ip4/" + wan + "/udp/"
				}
				nsA, outsideA := place(tt.a, 0)
				nsB, outsideB := place(tt.b, 1)
				got := meet(sub.client(nsA, relay), sub.client(nsB, relay), outsideA, outsideB, tt.wants.punched)
				rows[i] = fmt.Sprintf("| %s\t| %v", tt.name, got)
				got.millis = 0
				if got != tt.wants {
					t.Errorf("got  %v\nwant %v", got, tt.wants)
				}
			})
		})
	}
	running.Wait()
	w := tabwriter.NewWriter(&table, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| clients, the first dials\t| observed address told\t| dial\t| dials crossing\t| circuit\t| hole punched\t| 16 MiB went\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, row := range rows {
		fmt.Fprintln(w, row)
	}
	w.Flush()
	t.Logf("\n%s", &table)
}

// A mobile carrier: forty homes that cannot reach each other share one IPv4 address, and
// every limit per address applies to all of them together.
func TestFortyHomesBehindOneCarrier(t *testing.T) {
	l := newLab(t)
	relay := l.relay(l.public("relay", "11.0.0.1/8"), []string{relayV4})
	carrier := l.router("carrier", "11.2.0.1/8", endpointIndependent)
	homes := make([]*labClient, 40)
	joined := make(chan error, len(homes))
	for i := range homes {
		homes[i] = l.labClient(l.isolatedHome(fmt.Sprintf("h%d", i), carrier, 10+i))
		go func() { joined <- homes[i].join(relay) }()
	}
	for range homes {
		if err := <-joined; err != nil {
			t.Fatalf("join: %v", err)
		}
	}
	for i, c := range homes {
		mate := homes[(i+1)%len(homes)]
		if addrs := c.addrsOf(mate); !strings.HasPrefix(addrs[0].String(), "/ip4/11.2.0.1/udp/") {
			t.Errorf("%s is told %v for %s, want the carrier's address first", c.name, addrs, mate.name)
		}
		c.must(labRequest{Do: "reserve"})
	}
	a, b := homes[0], &peer.AddrInfo{ID: homes[1].id}
	a.must(labRequest{Do: "circuit", Peer: b})
	if resp := a.must(labRequest{Do: "sync", Peer: b, Bytes: 16 << 20}); !resp.Circuit {
		t.Error("two homes of one carrier synced directly, which is impossible here")
	}
}

// A cloud gives the relay a private address and maps a public one to it. The relay does not
// know its public address, unless the operator tells it.
func TestRelayBehindOneToOneNAT(t *testing.T) {
	t.Parallel()
	for _, announce := range []bool{false, true} {
		t.Run(fmt.Sprintf("announce=%v", announce), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cloud := l.router("cloud", "11.0.0.1/8", endpointIndependent)
			l.nft(cloud, `table ip cloud {
				chain arriving { type nat hook prerouting priority dstnat; iifname "wan" ip daddr 11.0.0.1 dnat to 192.168.1.10; }
			}`)
			var args []string
			if announce {
				args = []string{"--announce=11.0.0.1"}
			}
			relay := l.relay(l.home("relay", cloud, 10), []string{relayV4}, args...)
			a := l.client(l.home("a", l.router("ra", "11.2.0.1/8", endpointDependent), 10), relay)
			b := l.client(l.home("b", l.router("rb", "11.2.0.2/8", endpointDependent), 10), relay)

			want := "/ip4/192.168.1.10/udp/4001/quic-v1/p2p/" + relay.ID.String()
			if announce {
				want = relayV4 + "/p2p/" + relay.ID.String()
			}
			if res := b.must(labRequest{Do: "reserve"}); !slices.Equal(res.Addrs, []string{want}) {
				t.Errorf("reservation = %v, want %v", res.Addrs, want)
			}
			// Clients that know the relay's public address meet in either case.
			got := meet(a, b, "/ip4/11.2.0.1/udp/", "/ip4/11.2.0.2/udp/", false)
			got.millis = 0
			if want := (route{observed: true, circuit: true}); got != want {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

// A sync completes on bad paths too, as they occur at home and on the road.
func TestSyncOverBadPaths(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(l *lab, router string)
		delay time.Duration // added to each round trip to the relay
	}{
		{name: "5 % loss each way", spoil: func(l *lab, router string) {
			l.nft(router, `table ip loss {
				chain forwarded { type filter hook forward priority filter - 1; numgen random mod 100 < 5 drop; }
			}`)
		}},
		{name: "200 ms delay", delay: 200 * time.Millisecond},
		// The clients' own links have 1500, so they do not know.
		{name: "MTU 1280", spoil: func(l *lab, router string) { l.in(router, "ip link set wan mtu 1280") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			host := l.public
			if tt.delay > 0 {
				host = func(name string, addrs ...string) string { return l.far(name, tt.delay, 0, addrs...) }
			}
			relay := l.relay(host("relay", "11.0.0.1/8"), []string{relayV4})
			var ends [2]*labClient
			for i, name := range []string{"a", "b"} {
				router := l.router("r"+name, fmt.Sprintf("11.2.0.%d/8", i+1), endpointDependent)
				if tt.spoil != nil {
					tt.spoil(l, router)
				}
				ends[i] = l.client(l.home(name, router, 10), relay)
			}
			a, b := ends[0], &peer.AddrInfo{ID: ends[1].id}
			ends[1].must(labRequest{Do: "reserve"})
			a.must(labRequest{Do: "circuit", Peer: b})
			resp := a.must(labRequest{Do: "sync", Peer: b, Bytes: 16 << 20})
			if !resp.Circuit {
				t.Error("the sync went over a direct path, where there is none")
			}
			t.Logf("16 MiB in %.1f s", float64(resp.Millis)/1000)
		})
	}
}
