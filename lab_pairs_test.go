//go:build interop

package main

// Pairs and groups of the deployed clients in the NAT lab: who meets whom, over
// which path, and what brings two together again after the network or the relay has
// failed them. It needs what the NAT lab and the interop tests need; run with
//
//	go test -tags interop -run 'RustPairs|RustGroups' -v .
//
// Who meets is asserted. How long it takes is printed, and never asserted.

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// place is where a device is.
type place string

const (
	atPublic     place = "public"
	atRestricted place = "port-restricted NAT"
	atSymmetric  place = "symmetric NAT"
	atCarrier    place = "carrier and home NAT" // the carrier's is symmetric
	atIPv6       place = "IPv6"                 // and no IPv4
	atFirewall   place = "IPv6, firewall"       // and no IPv4
)

var places = []place{atPublic, atRestricted, atSymmetric, atCarrier, atIPv6, atFirewall}

func (p place) isIPv6() bool { return p == atIPv6 || p == atFirewall }

// site is a lab with a relay in it.
type site struct {
	*lab
	relay  *process
	launch func() *process // starts the relay, again if it was killed
	v4, v6 string          // where clients reach it
	all    []*site         // with the other relays that know this one; nil: it is alone
}

// labRelayArgsEnv has more arguments for the relay, such as --verbose.
const labRelayArgsEnv = "PRIVSTACK_LAB_RELAY_ARGS"

// site starts a relay in ns, which clients reach at 11.0.0.1 and 2a00:1::1.
func (l *lab) site(ns string, args ...string) *site {
	l.t.Helper()
	args = slices.Concat([]string{"--identity=" + filepath.Join(l.t.TempDir(), "key")}, args, strings.Fields(os.Getenv(labRelayArgsEnv)))
	s := &site{lab: l, v4: relayV4, v6: relayV6}
	s.launch = func() *process {
		l.t.Helper()
		p := launch(l.t, l.relayCommand(ns, args...))
		l.t.Cleanup(func() {
			if p.ProcessState == nil { // it has not been killed
				p.kill()
			}
			if l.t.Failed() {
				l.t.Logf("relay:\n%s", p.stderr)
			}
		})
		return p
	}
	s.relay = s.launch()
	return s
}

// publicSite makes a lab whose relay has public addresses.
func publicSite(t testing.TB, args ...string) *site {
	t.Helper()
	l := newLab(t)
	return l.site(l.public("relay", "11.0.0.1/8", "2a00:1::1/64"), args...)
}

// sub is the same site for a subtest.
func (s *site) sub(t testing.TB) *site {
	sub := *s
	sub.lab = &lab{t: t, inet: s.inet}
	return &sub
}

// device is a client at its place.
type device struct {
	*rustClient
	at     place
	ns     string
	router string // the namespace of its NAT, where it has one
}

// place makes a place for the nth device and starts nothing there.
func (s *site) place(at place, n int) *device {
	s.t.Helper()
	d := &device{at: at}
	name, outside := fmt.Sprint("d", n), labAddr(n)+"/8"
	switch at {
	case atPublic:
		d.ns = s.public(name, outside)
	case atRestricted:
		d.router = s.router("r"+name, outside, endpointIndependent)
	case atSymmetric:
		d.router = s.router("r"+name, outside, endpointDependent)
	case atCarrier:
		d.router = s.customer("r"+name, s.carrier("c"+name, outside), 2)
	case atIPv6, atFirewall:
		d.ns = s.public(name, fmt.Sprintf("2a00:1::2:%x/64", n))
	}
	if d.router != "" {
		d.ns = s.home(name, d.router, 10)
	}
	if at == atFirewall {
		s.nft(d.ns, `table ip6 firewall {
			chain arriving { type filter hook input priority filter; iifname "wan" meta l4proto udp ct state new drop; }
		}`)
	}
	return d
}

// labAddr is the public IPv4 address of the nth device.
func labAddr(n int) string { return fmt.Sprintf("11.2.%d.%d", n/250, n%250+1) }

// carrier makes a carrier's NAT, and customer a home's router in its network.
func (s *site) carrier(name, outside string) string {
	s.t.Helper()
	return s.routerOn(s.inet, name, outside, "100.64.0.1/10", endpointDependent)
}

func (s *site) customer(name, carrier string, host int) string {
	s.t.Helper()
	router := s.routerOn(carrier, name, fmt.Sprintf("100.64.0.%d/10", host), "192.168.1.1/24", endpointIndependent)
	s.in(router, "ip route add default via 100.64.0.1")
	return router
}

// join starts d's client, which may be one that was killed.
func (s *site) join(d *device, code string, args ...string) {
	s.t.Helper()
	d.rustClient = startRustBy(s.t, []string{"ip", "netns", "exec", d.ns}, s.reach(d.at), code, args...)
}

// reach is the relay as clients at a place know it.
func (s *site) reach(at place) peer.AddrInfo {
	addr := s.v4
	if at.isIPv6() {
		addr = s.v6
	}
	return peer.AddrInfo{ID: s.relay.bootstrap.ID, Addrs: []ma.Multiaddr{ma.StringCast(addr)}}
}

// settle waits until d's record is stored and its first search is over.
func (s *site) settle(d *device) {
	s.t.Helper()
	deadline := time.Now().Add(meetWithin)
	for _, event := range []string{"stored", "searched"} {
		if d.first(0, deadline, func(e rustEvent) bool { return e.is(event) }) == nil {
			s.t.Fatalf("%s at %s: not %s within %v", d.id, d.at, event, meetWithin)
		}
	}
}

// tells reports whether the relay knows the addresses that d has in its LAN. A client
// that is connected, in this lab without delay, before it knows them itself says in
// identify that it has none, and does not correct it.
func (s *site) tells(asker *labClient, d *device) bool {
	s.t.Helper()
	id, err := peer.Decode(d.id)
	if err != nil {
		s.t.Fatal(err)
	}
	resp := asker.must(labRequest{Do: "find", Peer: &peer.AddrInfo{ID: id}})
	return slices.ContainsFunc(resp.Addrs, func(addr string) bool { return strings.HasPrefix(addr, "/ip4/192.168.1.") })
}

// meetWithin is how long devices have to meet: two ticks, and what a query may take.
const meetWithin = 75 * time.Second

// met says how two devices came together: how long after its start the second had
// done each step, and how they are connected.
type met struct {
	stored, found, connected, message time.Duration
	there, back                       time.Duration // 16 MiB from the second, and to it
	way                               string
}

func (m met) String() string {
	var cells []string
	for _, d := range []time.Duration{m.stored, m.found, m.connected, m.message, m.there, m.back} {
		cells = append(cells, seconds(d))
	}
	return strings.Join(append(cells, m.way), "\t| ")
}

func seconds(d time.Duration) string {
	if d == 0 {
		return "never"
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func since(e rustEvent) time.Duration {
	d, _ := e["after"].(time.Duration)
	return d
}

// meet starts the second device, once the first has settled, and waits until messages
// went both ways between them, small ones and large. The second has these further
// arguments.
func (s *site) meet(first, second *device, code string, args ...string) (m met) {
	s.t.Helper()
	s.settle(first)
	s.join(second, code, args...)
	deadline := time.Now().Add(meetWithin)
	m.message = since(second.first(0, deadline, messageWith(first.rustClient)))
	connected := func(e rustEvent) bool { return e.is("connected", "peer", first.id) }
	found := func(e rustEvent) bool { return e.is("found", "peer", first.id) }
	m.connected, m.found = since(second.first(0, deadline, connected)), since(second.first(0, deadline, found))
	m.stored = since(second.first(0, deadline, func(e rustEvent) bool { return e.is("stored") }))
	if m.message == 0 {
		s.t.Errorf("%s, then %s: no message within %v", first.at, second.at, meetWithin)
		return m
	}
	s.exchange(first, second, &m)
	return m
}

// exchange sends a small message to the second device, which has sent one, and
// 16 MiB each way.
func (s *site) exchange(first, second *device, m *met) {
	s.t.Helper()
	if !first.reaches(second) {
		s.t.Errorf("%s, then %s: no message back", first.at, second.at)
		return
	}
	large := func(from, to *device) time.Duration {
		began := time.Now()
		if from.carry(to.rustClient, 16<<20, began.Add(2*time.Minute)) == nil {
			s.t.Errorf("16 MiB did not arrive, from %s to %s", from.at, to.at)
			return 0
		}
		return time.Since(began)
	}
	m.there, m.back = large(second, first), large(first, second)
	m.way = second.way(first, s)
}

// reaches reports whether a message to mate arrives, over a connection that there is.
func (d *device) reaches(mate *device) bool {
	return d.carry(mate.rustClient, 2000, time.Now().Add(testTimeout)) != nil
}

// messageWith reports whether e says that a message went to the mate, or came.
func messageWith(mate *rustClient) func(e rustEvent) bool {
	return func(e rustEvent) bool {
		return e.is("received", "peer", mate.id) || e.is("synced", "peer", mate.id) && e["ok"] == true
	}
}

// way says what the connections are that d has with its mate now. A bridged one has
// the relay's address.
func (d *device) way(mate *device, s *site) string {
	addrs := map[string]string{} // by connection
	for _, e := range d.seen(0) {
		switch {
		case e.is("connected", "peer", mate.id):
			addrs[e.str("connection")] = e.str("addr")
		case e.is("closed", "peer", mate.id):
			delete(addrs, e.str("connection"))
		}
	}
	var direct, bridged bool
	for _, addr := range addrs {
		if slices.ContainsFunc(append([]*site{s}, s.all...), func(r *site) bool {
			return strings.HasPrefix(addr, r.v4+"/") || strings.HasPrefix(addr, r.v6+"/") || addr == r.v4 || addr == r.v6
		}) {
			bridged = true
		} else {
			direct = true
		}
	}
	switch {
	case direct && bridged:
		return "both"
	case direct:
		return "direct"
	case bridged:
		return "bridge"
	}
	return "none"
}

// concurrently runs n subtests, at most so many at a time. (t.Parallel would run
// as many as there are cores, and these wait for the network.)
func concurrently(t *testing.T, n, most int, name func(i int) string, do func(t *testing.T, i int)) {
	var running sync.WaitGroup
	free := make(chan struct{}, most)
	for i := range n {
		free <- struct{}{}
		running.Go(func() {
			defer func() { <-free }()
			t.Run(name(i), func(t *testing.T) { do(t, i) })
		})
	}
	running.Wait()
}

// logTable prints rows of cells that are parted by tabs and bars.
func logTable(t *testing.T, head string, rows []string) {
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 1, ' ', 0)
	fmt.Fprintf(w, "| %s\t|\n|%s\n", head, strings.Repeat("---\t|", 1+strings.Count(head, "|")))
	for _, row := range rows {
		if row != "" { // -run has left it out, or it failed early
			fmt.Fprintf(w, "| %s\t|\n", row)
		}
	}
	w.Flush()
	t.Logf("\n%s", &table)
}

// The product's promise: any two devices meet, whatever is between them, and those
// who can reach one another do without the relay.
func TestRustPairsMeet(t *testing.T) {
	t.Parallel()
	s := publicSite(t)
	asker := s.client(s.public("asker", "11.3.0.1/8"), s.reach(atPublic))
	type pair struct {
		first, second place
		together      func(s *site, n int) (first, second *device) // where it is not for place
		direct        bool
	}
	var pairs []pair
	for _, first := range places {
		for _, second := range places {
			// The second dials the first, so it is where the first can be dialled that
			// a connection has to be direct.
			direct := first == atPublic && !second.isIPv6() || first == atIPv6 && second.isIPv6()
			pairs = append(pairs, pair{first: first, second: second, direct: direct})
		}
	}
	inOneLAN := func(kind natKind) func(s *site, n int) (first, second *device) {
		return func(s *site, n int) (first, second *device) {
			router := s.router(fmt.Sprint("r", n), labAddr(n)+"/8", kind)
			return &device{ns: s.home(fmt.Sprint("d", n), router, 10), at: "one LAN"},
				&device{ns: s.home(fmt.Sprint("d", n+1), router, 11), at: "one LAN"}
		}
	}
	pairs = append(pairs,
		pair{first: "one LAN", second: "port-restricted NAT", together: inOneLAN(endpointIndependent), direct: true},
		pair{first: "one LAN", second: "symmetric NAT", together: inOneLAN(endpointDependent), direct: true},
		pair{first: "one carrier", second: "two homes", together: func(s *site, n int) (first, second *device) {
			carrier := s.carrier(fmt.Sprint("c", n), labAddr(n)+"/8")
			for i, d := range []**device{&first, &second} {
				home := s.customer(fmt.Sprint("r", n+i), carrier, 2+i)
				*d = &device{ns: s.home(fmt.Sprint("d", n+i), home, 10), router: home, at: "one carrier"}
			}
			return first, second
		}},
	)
	rows := make([]string, len(pairs))
	concurrently(t, len(pairs), 6, func(i int) string {
		return fmt.Sprintf("%s then %s", pairs[i].first, pairs[i].second)
	}, func(t *testing.T, i int) {
		p, s := pairs[i], s.sub(t)
		var first, second *device
		if p.together != nil {
			first, second = p.together(s, 2*i)
		} else {
			first, second = s.place(p.first, 2*i), s.place(p.second, 2*i+1)
		}
		code := fmt.Sprint("pair ", i)
		s.join(first, code)
		for p.first == "one LAN" && !s.tells(asker, first) {
			first.kill()
			s.join(first, code)
			s.settle(first)
		}
		m := s.meet(first, second, code)
		rows[i] = fmt.Sprintf("%s\t| %s\t| %v", p.first, p.second, m)
		if p.direct && m.way != "direct" {
			t.Errorf("they are connected by %q, want a direct connection alone", m.way)
		}
	})
	logTable(t, "first\t| second\t| stored\t| found\t| connected\t| message\t| 16 MiB\t| and back\t| way", rows)
}

// publicSites makes a lab with n relays that know each other: the first names all, and
// the others name the first. rtt is added to each round trip to a relay.
func publicSites(t testing.TB, n int, rtt time.Duration) []*site {
	t.Helper()
	l := newLab(t)
	sites, files, names := make([]*site, n), make([]string, n), make([]string, n)
	for i := range sites {
		files[i] = filepath.Join(t.TempDir(), "key")
		key := newTestKey(t)
		if err := createIdentity(files[i], key); err != nil {
			t.Fatal(err)
		}
		names[i] = fmt.Sprintf("--bootstrap=/ip4/11.0.0.%d/udp/4001/quic-v1/p2p/%s", i+1, peerIDOf(t, key))
	}
	for i := range sites {
		named := names[:1]
		if i == 0 {
			named = names[1:]
		}
		ns := l.far(fmt.Sprint("relay", i), rtt, 0, fmt.Sprintf("11.0.0.%d/8", i+1), fmt.Sprintf("2a00:1::%d/64", i+1))
		sites[i] = l.site(ns, append([]string{"--identity=" + files[i]}, named...)...)
		sites[i].v4 = fmt.Sprintf("/ip4/11.0.0.%d/udp/4001/quic-v1", i+1)
		sites[i].v6 = fmt.Sprintf("/ip6/2a00:1::%d/udp/4001/quic-v1", i+1)
	}
	for _, s := range sites {
		s.all = sites
		s.waitMesh()
	}
	return sites
}

// waitMesh waits until the relay is connected to all others.
func (s *site) waitMesh() {
	s.t.Helper()
	eventuallyWithin(s.t, meshTimeout, "the relay is connected to all others", func() bool {
		return strings.Count(s.relay.stderr.String(), `msg="other relay connected"`) >= len(s.all)-1
	})
}

// keepers returns the sites whose relays keep the record of that code.
func (s *site) keepers(code string) (keepers []*site) {
	hash := sha256.Sum256([]byte(code))
	at := kb.ConvertKey("/privstack/syncgroup/" + string(hash[:]))
	var ids []peer.ID
	for _, other := range s.all {
		ids = append(ids, other.relay.bootstrap.ID)
	}
	ids = kb.SortClosestPeers(ids, at)[:min(groupRelays, len(ids))]
	return slices.DeleteFunc(slices.Clone(s.all), func(r *site) bool { return !slices.Contains(ids, r.relay.bootstrap.ID) })
}

// relays returns those of its relays that d has been connected to.
func (d *device) relays(s *site) (met []*site) {
	for _, r := range s.all {
		if d.has("connected", "peer", r.relay.peerID) {
			met = append(met, r)
		}
	}
	return met
}

// wrongDials counts the dials that ended at somebody else.
func (d *device) wrongDials() (n int) {
	for _, e := range d.seen(0) {
		if e.is("dial_failed") && strings.Contains(strings.ToLower(e.str("error")), "unexpected peer") {
			n++
		}
	}
	return n
}

// Users who know different relays of a federation meet as fast as those of one relay, but
// for the round trips to the relays that keep their record. And their devices are
// connected to those alone, and to the relays that the two know.
func TestRustPairsOfFourRelays(t *testing.T) {
	kinds := [][2]place{{atPublic, atPublic}, {atRestricted, atRestricted}, {atRestricted, atSymmetric}, {atSymmetric, atSymmetric}, {atIPv6, atRestricted}}
	const (
		each = 4 // pairs of each kind
		rtt  = 100 * time.Millisecond
	)
	var rows []string
	for _, relays := range []int{1, 4} {
		sites := publicSites(t, relays, rtt)
		took := make([][]met, len(kinds))
		var mu sync.Mutex
		wrong, twice := 0, 0 // dials that ended at somebody else; pairs that connected twice
		concurrently(t, len(kinds)*each, 3, func(i int) string {
			return fmt.Sprintf("%d relays, %s then %s %d", relays, kinds[i%len(kinds)][0], kinds[i%len(kinds)][1], i/len(kinds))
		}, func(t *testing.T, i int) {
			kind, code := i%len(kinds), fmt.Sprint("pair ", i)
			here, there := sites[i%relays].sub(t), sites[(i+1+i%3)%relays].sub(t) // of four: two that differ
			first, second := here.place(kinds[kind][0], 2*i), here.place(kinds[kind][1], 2*i+1)
			here.join(first, code)
			m := there.meet(first, second, code)
			mu.Lock()
			defer mu.Unlock()
			took[kind] = append(took[kind], m)
			for _, d := range []*device{first, second} {
				for _, r := range d.relays(here) {
					if r.relay != here.relay && r.relay != there.relay && !slices.Contains(here.keepers(code), r) {
						t.Error("a device is connected to a relay that neither keeps its record nor is known to its mate")
					}
				}
				wrong += d.wrongDials()
			}
			if len(slices.DeleteFunc(second.seen(0), func(e rustEvent) bool { return !e.is("connected", "peer", first.id) })) > 1 {
				twice++
			}
		})
		t.Logf("%d relays: %d dials ended at somebody else, %d pairs of %d have connected twice", relays, wrong, twice, len(kinds)*each)
		for kind, all := range took {
			var found, connected, message []time.Duration
			ways := map[string]int{}
			for _, m := range all {
				found, connected, message = append(found, m.found), append(connected, m.connected), append(message, m.message)
				ways[m.way]++
			}
			rows = append(rows, fmt.Sprintf("%d\t| %s\t| %s\t| %s\t| %s\t| %s\t| %v", relays, kinds[kind][0], kinds[kind][1],
				seconds(percentile(found, 0.5)), seconds(percentile(connected, 0.5)), seconds(percentile(message, 0.5)), ways))
		}
	}
	t.Logf("a round trip to a relay takes %v", rtt)
	logTable(t, "relays\t| first\t| second\t| found, median\t| connected\t| message\t| ways", rows)
}

// A family whose devices know four different relays go on when a relay is gone that keeps
// its record, and when it is back; so does a device that comes meanwhile.
func TestRustGroupOutlivesARelay(t *testing.T) {
	const code = "family"
	sites := publicSites(t, 4, 0)
	var devices []*device
	join := func(home *site, at place) {
		t.Helper()
		d := home.place(at, len(devices))
		home.join(d, code)
		home.settle(d)
		devices = append(devices, d)
	}
	// talk waits until each pair has exchanged messages, over new connections where the
	// old ones ran through a relay that is gone.
	talk := func(when string) {
		t.Helper()
		began := time.Now()
		var talking sync.WaitGroup
		for n, d := range devices {
			for _, mate := range devices[:n] {
				talking.Go(func() { sites[0].talk([2]*device{d, mate}, began, 2*meetWithin) })
			}
		}
		talking.Wait()
		wrong := 0
		for _, d := range devices {
			wrong += d.wrongDials()
		}
		t.Logf("%s: %d devices talk after %v; %d dials so far ended at somebody else", when, len(devices), time.Since(began).Round(time.Second/10), wrong)
	}
	for i, at := range []place{atPublic, atRestricted, atSymmetric, atFirewall} {
		join(sites[i], at)
	}
	talk("all are there")
	keeper := sites[0].keepers(code)[0]
	alive := slices.DeleteFunc(slices.Clone(sites), func(s *site) bool { return s == keeper })
	keeper.relay.kill()
	talk("a relay is killed that keeps the record")
	join(alive[0], atSymmetric)
	talk("a device comes")
	keeper.relay = keeper.launch()
	keeper.waitMesh()
	join(keeper, atRestricted)
	talk("the relay is back, and a device comes that knows it")
}

// A family's devices: each comes to exchange messages with each other one, though the
// relay keeps one record for all of them.
func TestRustGroupsMeet(t *testing.T) {
	s := publicSite(t)
	sizes := []int{3, 5, 8}
	rows := make([]string, len(sizes))
	concurrently(t, len(sizes), len(sizes), func(i int) string { return fmt.Sprint(sizes[i]) }, func(t *testing.T, i int) {
		s := s.sub(t)
		devices := make([]*device, sizes[i])
		for n := range devices {
			// Groups begin at another place each, so that all three differ.
			devices[n] = s.place(places[(n+2*i)%len(places)], 20*i+n)
			s.join(devices[n], fmt.Sprint("group ", sizes[i]))
			s.settle(devices[n])
		}
		// Two that need not sync may be connected for a minute and no longer, so each
		// pair is followed by itself.
		began := time.Now()
		var talking sync.WaitGroup
		var mu sync.Mutex
		var last time.Duration
		found := 0 // pairs of which one looked the other up, and so syncs with it
		ways := map[string]int{}
		for n, d := range devices {
			for m, mate := range devices[:n] {
				talking.Go(func() {
					took := s.talk([2]*device{d, mate}, began, 4*meetWithin)
					way := d.way(mate, s)
					if m == n-1 && d.carry(mate.rustClient, 16<<20, time.Now().Add(2*time.Minute)) == nil {
						t.Errorf("16 MiB did not arrive, from %s to %s", d.at, mate.at)
					}
					mu.Lock()
					defer mu.Unlock()
					last = max(last, took)
					ways[way]++
					if d.has("found", "peer", mate.id) || mate.has("found", "peer", d.id) {
						found++
					}
				})
			}
		}
		talking.Wait()
		rows[i] = fmt.Sprintf("%d\t| %s\t| %d\t| %d\t| %v", sizes[i], seconds(last), sizes[i]*(sizes[i]-1)/2, found, ways)
	})
	logTable(t, "devices\t| last pair talks after\t| pairs\t| of which one found the other\t| ways", rows)
}

// Other libp2p software: two that punch holes do so as before, over a circuit, and
// the relay leaves it to them when they are of one group.
func TestRustPairsPunch(t *testing.T) {
	for _, found := range []bool{false, true} {
		t.Run(fmt.Sprintf("found=%v", found), func(t *testing.T) {
			t.Parallel()
			s := publicSite(t)
			first, second := s.place(atRestricted, 0), s.place(atRestricted, 1)
			punching := []string{"mode=circuits", "circuit=1", "dcutr=1"}
			s.join(first, "punch", punching...)
			first.wait("reserved")
			first.wait("stored")
			if found {
				s.join(second, "punch", punching...)
			} else {
				s.join(second, "another", punching...)
				second.wait("identified", "peer", s.relay.peerID)
				second.command("dial %s/p2p/%s/p2p-circuit/p2p/%s", s.v4, s.relay.peerID, first.id)
			}
			deadline := time.Now().Add(meetWithin)
			punched := func(e rustEvent) bool { return e.is("punched") && e["ok"] == true }
			if !found && second.first(0, deadline, punched) == nil && first.first(0, deadline, punched) == nil {
				t.Fatal("no hole was punched")
			}
			direct := second.first(0, deadline, func(e rustEvent) bool {
				return e.is("connected", "peer", first.id) && e["circuit"] == false
			})
			if want := "/ip4/" + labAddr(0) + "/"; direct == nil || !strings.HasPrefix(direct.str("addr"), want) {
				t.Fatalf("the direct connection is %v, want one with %s", direct, want)
			}
			if second.carry(first.rustClient, 16<<20, time.Now().Add(2*time.Minute)) == nil {
				t.Error("16 MiB did not arrive")
			}
			t.Logf("directly connected %s after its start", seconds(since(direct)))
		})
	}
}

// What happens to networks and relays: the two devices of a pair exchange messages
// again after it, with nobody doing anything.
func TestRustPairsMeetAgain(t *testing.T) {
	t.Parallel()
	type trial struct {
		name   string
		at     [2]place
		relay  func(l *lab) *site          // else one with public addresses
		before func(s *site, d [2]*device) // what makes the network worse
		after  func(s *site, d [2]*device) // what happens to two that have met
		args   []string                    // of the second client
	}
	symmetric := [2]place{atSymmetric, atSymmetric}
	mixed := [2]place{atRestricted, atSymmetric}
	rebind := func(s *site, d [2]*device) {
		// Linux drops what it masqueraded through an interface that goes down, and
		// gives a random port to what comes next.
		s.in(d[1].router, "ip link set wan down", "ip link set wan up")
	}
	move := func(s *site, d [2]*device) {
		s.in(d[1].router, "ip addr del "+labAddr(1)+"/8 dev wan", "ip addr add "+labAddr(101)+"/8 dev wan")
	}
	behind := func(outside string, rule string, more string, args ...string) func(l *lab) *site {
		return func(l *lab) *site {
			cloud := l.router("cloud", "11.0.0.1/8", endpointIndependent)
			l.nft(cloud, `table ip cloud {
				chain arriving { type nat hook prerouting priority dstnat; iifname "wan" ip daddr 11.0.0.1 `+rule+`; }
			}`)
			if more != "" {
				l.in(cloud, more)
			}
			s := l.site(l.home("relay", cloud, 10), args...)
			s.v4 = outside
			return s
		}
	}
	const forwarded = "/ip4/11.0.0.1/udp/14001/quic-v1"
	far := func(rtt, jitter time.Duration) func(l *lab) *site {
		return func(l *lab) *site { return l.site(l.far("relay", rtt, jitter, "11.0.0.1/8", "2a00:1::1/64")) }
	}
	trials := []trial{
		{name: "NAT rebinds, bridged", at: symmetric, after: rebind},
		{name: "NAT rebinds, direct", at: [2]place{atPublic, atSymmetric}, after: rebind},
		{name: "home's address changes, bridged", at: mixed, after: move},
		{name: "home's address changes, direct", at: [2]place{atPublic, atRestricted}, after: move},
		{name: "relay restarts", at: symmetric, after: func(s *site, d [2]*device) {
			s.relay.kill()
			s.relay = s.launch()
		}},
		{name: "mate killed, back as another", at: mixed, after: func(s *site, d [2]*device) {
			d[1].kill()
			s.join(d[1], "again")
		}},
		{name: "mate killed, back as the same", at: mixed, args: []string{"key=mate"}, after: func(s *site, d [2]*device) {
			d[1].kill()
			s.join(d[1], "again", "key=mate")
		}},
		{name: "relay behind 1:1 NAT", at: mixed, relay: behind(relayV4, "dnat to 192.168.1.10", "")},
		{name: "relay behind 1:1 NAT, --announce", at: mixed, relay: behind(relayV4, "dnat to 192.168.1.10", "", "--announce=11.0.0.1")},
		{name: "relay behind port forwarding", at: mixed, relay: behind(forwarded, "udp dport 14001 dnat to 192.168.1.10:4001", "")},
		{name: "relay behind port forwarding, --announce", at: mixed, relay: behind(forwarded, "udp dport 14001 dnat to 192.168.1.10:4001", "", "--announce="+forwarded)},
		{name: "relay behind an MTU of 1280", at: mixed, relay: behind(relayV4, "dnat to 192.168.1.10", "ip link set wan mtu 1280")},
		// The clients' own links have 1500, so that nobody learns it from them.
		{name: "client links of 1280", at: mixed, before: func(s *site, d [2]*device) {
			for _, d := range d {
				s.in(d.router, "ip link set wan mtu 1280")
			}
		}},
		{name: "5 % loss each way at each home", at: mixed, before: func(s *site, d [2]*device) {
			for _, d := range d {
				s.nft(d.router, `table ip loss {
					chain forwarded { type filter hook forward priority filter - 1; numgen random mod 100 < 5 drop; }
				}`)
			}
		}},
		{name: "reordering at the relay", at: mixed, relay: far(0, 3*time.Millisecond)},
		{name: "200 ms more to the relay", at: mixed, relay: far(200*time.Millisecond, 0)},
	}
	rows := make([]string, len(trials))
	concurrently(t, len(trials), len(trials), func(i int) string { return trials[i].name }, func(t *testing.T, i int) {
		tt := trials[i]
		var s *site
		if tt.relay == nil {
			s = publicSite(t)
		} else {
			s = tt.relay(newLab(t))
		}
		d := [2]*device{s.place(tt.at[0], 0), s.place(tt.at[1], 1)}
		if tt.before != nil {
			tt.before(s, d)
		}
		s.join(d[0], "again")
		m := s.meet(d[0], d[1], "again", tt.args...)
		again := "\t|"
		if tt.after != nil && m.way != "" {
			began := time.Now()
			tt.after(s, d)
			again = seconds(s.talk(d, began, 2*meetWithin)) + "\t| " + d[1].way(d[0], s)
		}
		rows[i] = fmt.Sprintf("%s\t| %v\t| %s", tt.name, m, again)
	})
	logTable(t, "what\t| stored\t| found\t| connected\t| message\t| 16 MiB\t| and back\t| way\t| again after\t| way", rows)
}

// talk waits until messages that were sent after this moment have gone both ways, and
// says how long after began that was, 0 if never. It asks for messages over connections
// that there are; to make one is the clients' own affair.
func (s *site) talk(d [2]*device, began time.Time, within time.Duration) time.Duration {
	s.t.Helper()
	const bytes = 3000
	deadline := began.Add(within)
	from := [2]int{len(d[0].seen(0)), len(d[1].seen(0))}
	arrived := make(chan bool, 2)
	stop := make(chan struct{})
	defer close(stop)
	for i, c := range d {
		mate := d[1-i]
		go func() {
			arrived <- c.first(from[i], deadline, func(e rustEvent) bool {
				return e.is("synced", "peer", mate.id) && e["bytes"] == float64(bytes)
			}) != nil
		}()
		go func() {
			tick := time.NewTicker(250 * time.Millisecond)
			defer tick.Stop()
			for {
				c.command("probe %s %d", mate.id, bytes)
				select {
				case <-tick.C:
				case <-stop:
					return
				}
			}
		}()
	}
	if one, other := <-arrived, <-arrived; !one || !other {
		s.t.Errorf("no messages both ways between %s and %s within %v", d[0].at, d[1].at, within)
		return 0
	}
	return time.Since(began)
}
