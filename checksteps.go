package main

// The steps of `privstack-relay check`, in the order in which they are taken:
// each does one thing that clients do, with what the steps before have found,
// and explains what it finds. The command itself is in check.go, the clients
// that it plays are in checkhost.go.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protowire"
)

// checker carries what one step learns to the next.
type checker struct {
	target checkTarget
	a, b   *checkHost

	// blocked is why the steps that follow make no sense. Empty: they do.
	blocked string

	ips     map[family][]netip.Addr // the host's, at most maxCheckIPs each
	noRoute map[family]error        // why this machine can't send to them

	id        peer.ID // the relay's: promised, or else found
	endpoints map[family]endpointAnswer
	listed    []string // by the endpoint that answered; nil if none did
	dials     []dialled
	used      *probe // the address over which the rest is checked

	reservation *circuitclient.Reservation
}

// checkRelay takes all the steps and hands each to report as it ends. The error
// is one of this machine's; what is wrong with the relay is in the steps.
func checkRelay(ctx context.Context, target checkTarget, report func(checkStep)) (r checkReport, err error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	c := &checker{target: target, id: target.id, ips: make(map[family][]netip.Addr), noRoute: make(map[family]error)}
	for _, h := range []**checkHost{&c.a, &c.b} {
		if *h, err = newCheckHost(); err != nil {
			return r, fmt.Errorf("start a client: %w", err)
		}
		defer (*h).Close()
	}

	r = checkReport{Target: target.given, OK: true, Version: buildVersion()}
	for _, step := range []struct {
		name string
		most time.Duration
		take func(context.Context) checkStep
	}{
		{"name", checkAskTime, c.resolve},
		{"identity-ipv4", checkDialTime, func(ctx context.Context) checkStep { return c.identity(ctx, ipv4) }},
		{"identity-ipv6", checkDialTime, func(ctx context.Context) checkStep { return c.identity(ctx, ipv6) }},
		{"quic-ipv4", checkAskTime + checkDialTime, func(ctx context.Context) checkStep { return c.quic(ctx, ipv4) }},
		{"quic-ipv6", checkAskTime + checkDialTime, func(ctx context.Context) checkStep { return c.quic(ctx, ipv6) }},
		{"addresses", checkAskTime, c.addresses},
		{"identify", checkAskTime, c.identify},
		{"observed", checkAskTime, c.observed},
		{"nat", checkAskTime, c.nat},
		{"clients", checkDialTime, c.clients},
		{"dht", checkAskTime, c.dht},
		{"record", checkAskTime, c.record},
		{"reservation", checkAskTime, c.reserve},
		{"circuit", checkCircuitTime, c.circuit},
	} {
		var s checkStep
		switch begun := time.Now(); {
		case ctx.Err() != nil:
			s = failed(diagnosis{}, "not reached: %v", ctx.Err())
		case c.blocked != "":
			s = skipped("%s", c.blocked)
		default:
			stepCtx, cancel := context.WithTimeout(ctx, step.most)
			s = step.take(stepCtx)
			cancel()
			if s.Millis == 0 && s.Result != checkSkipped {
				s.Millis = millis(time.Since(begun))
			}
		}
		s.Name, s.Detail = step.name, clean(s.Detail)
		for i, line := range s.Lines {
			s.Lines[i] = clean(line)
		}
		if s.Result == checkFailed {
			r.OK = false
		}
		r.Steps = append(r.Steps, s)
		report(s)
	}
	if c.id != "" {
		r.PeerID = c.id.String()
	}
	r.Millis = millis(time.Since(begun))
	return r, nil
}

// millis is d in milliseconds, to the microsecond.
func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// resolve finds the host's addresses, and which of them this machine can send to.
func (c *checker) resolve(ctx context.Context) checkStep {
	host := c.target.host
	ip, err := netip.ParseAddr(host)
	ips := []netip.Addr{ip.Unmap()}
	isName := err != nil
	if isName {
		if ips, err = lookup(ctx, host); err != nil {
			c.blocked = "needs an address of " + host
			return failed(likely("the name is mistyped, or its DNS record is missing or not yet known everywhere", "getent ahosts "+host),
				"%s has no address: %v", host, err)
		}
	}
	var all []string
	for _, ip := range ips {
		f := familyOf(ip)
		if len(c.ips[f]) < maxCheckIPs && (c.target.addr == nil || standsFor(c.target.addr, ip)) {
			c.ips[f] = append(c.ips[f], ip)
			all = append(all, ip.String())
		}
	}
	if len(all) == 0 { // /dns4 or /dns6 before a name that has the other
		c.blocked = "needs an address of " + host
		return failed(likely("the DNS record for this family is missing", "getent ahosts "+host), "%s has no such address", c.target.addr)
	}
	for f, ips := range c.ips {
		if err := routeTo(ips[0]); err != nil {
			c.noRoute[f] = err
		}
	}
	values := map[string]any{"addresses": all}
	if len(c.noRoute) == len(c.ips) {
		c.blocked = "needs a way to " + host
		return failed(likely("this machine has no network, or not of this family", "ip route"), "no route to %s", strings.Join(all, ", ")).with(values)
	}
	if !isName {
		return skipped("%s is an address", host).with(values)
	}
	return passed("%s", strings.Join(all, ", ")).with(values)
}

// standsFor tells whether ip is of the family that addr, which has a name, wants.
func standsFor(addr ma.Multiaddr, ip netip.Addr) bool {
	switch addr[0].Protocol().Code {
	case ma.P_DNS4:
		return ip.Is4()
	case ma.P_DNS6:
		return ip.Is6()
	}
	return true
}

// lookup returns host's addresses without zones, which multiaddrs don't have.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i, ip := range ips {
		ips[i] = ip.Unmap().WithZone("")
	}
	return ips, err
}

// routeTo says why this machine can't send to ip, or nil. Nothing is sent:
// connecting a UDP socket only looks up the way.
func routeTo(ip netip.Addr) error {
	conn, err := net.Dial("udp", net.JoinHostPort(ip.String(), "9"))
	if err != nil {
		return inner(err)
	}
	return conn.Close()
}

// inner is err without the addresses that a failed dial names, which are known.
func inner(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}

// endpointAnswer is what the identity endpoint says over one family.
type endpointAnswer struct {
	took  time.Duration
	id    peer.ID
	addrs []string
	err   error
	why   diagnosis
}

// identity asks the endpoint as clients do; the first call asks over both families.
func (c *checker) identity(ctx context.Context, f family) checkStep {
	if c.target.url == nil {
		return skipped("not needed: the address names the peer ID")
	}
	if c.endpoints == nil {
		c.endpoints = make(map[family]endpointAnswer)
		var mu sync.Mutex
		var asking sync.WaitGroup
		for f, ips := range c.ips {
			if c.noRoute[f] == nil {
				asking.Go(func() {
					a := askEndpoint(ctx, c.target.url, ips[0])
					mu.Lock()
					c.endpoints[f] = a
					mu.Unlock()
				})
			}
		}
		asking.Wait()
	}
	if s, missing := c.missing(f); missing {
		return s
	}
	a := c.endpoints[f]
	at := net.JoinHostPort(c.ips[f][0].String(), c.target.url.Port())
	var s checkStep
	switch {
	case a.err != nil:
		s = failed(a.why, "%s: %v", at, a.err)
	case c.id != "" && c.id != a.id:
		s = failed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.target.host),
			"%s names %s, but over IPv4 it is %s", at, a.id, c.id)
	default:
		if c.id == "" {
			c.id, c.listed = a.id, append([]string{}, a.addrs...)
		}
		s = passed("%s: %s", at, a.id)
	}
	s.Millis = millis(a.took)
	return s
}

// family is IPv4 or IPv6.
type family int

const (
	ipv4 family = 4
	ipv6 family = 6
)

func (f family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

func familyOf(ip netip.Addr) family {
	if ip.Is4() {
		return ipv4
	}
	return ipv6
}

// missing is the step where f can't be checked: the host or this machine lacks it.
func (c *checker) missing(f family) (checkStep, bool) {
	switch {
	case len(c.ips[f]) == 0 && net.ParseIP(c.target.host) != nil:
		return skipped("%s was asked for", c.target.host), true
	case len(c.ips[f]) == 0:
		return skipped("%s has no %v address", c.target.host, f), true
	case c.noRoute[f] != nil:
		return skipped("this machine has no %v: %v", f, c.noRoute[f]), true
	}
	return checkStep{}, false
}

// askEndpoint gets u from ip, whatever address its host name has.
func askEndpoint(ctx context.Context, u *url.URL, ip netip.Addr) (a endpointAnswer) {
	begun := time.Now()
	defer func() { a.took = time.Since(begun) }()
	var connected atomic.Bool
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			conn, err := new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
			connected.Store(err == nil)
			return conn, err
		},
		MaxResponseHeaderBytes: 16 << 10,
		DisableKeepAlives:      true,
	}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 || req.URL.Hostname() != u.Hostname() {
			return fmt.Errorf("redirected to %s", req.URL)
		}
		return nil
	}}
	fail := func(err error, why diagnosis) endpointAnswer {
		a.err, a.why = err, why
		return a
	}

	port := u.Port()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return fail(err, diagnosis{})
	}
	req.Header.Set("User-Agent", "privstack-relay-check/"+buildVersion())
	resp, err := client.Do(req)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // without the URL, which is known
		}
		err = inner(err)
		switch timedOut := ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded); {
		case timedOut && !connected.Load():
			return fail(errors.New("no answer"), likely("TCP "+port+" is closed in the firewall of the machine or of its provider", "ufw allow "+port+"/tcp", "systemctl status privstack-relay"))
		case timedOut:
			return fail(errors.New("takes the connection and does not answer in time"), hung(port))
		case strings.Contains(err.Error(), "refused"):
			return fail(err, likely("nothing listens on TCP "+port+": the relay is not running, or has another --http-port", "systemctl status privstack-relay"))
		case !connected.Load():
			return fail(err, likely("the machine is not reached: it is down, or a firewall rejects TCP "+port, "ufw allow "+port+"/tcp"))
		case strings.Contains(err.Error(), "x509") || strings.Contains(err.Error(), "tls:"):
			return fail(err, likely("the reverse proxy has no valid certificate for "+u.Hostname(), "curl -v "+u.String()))
		}
		return fail(err, likely("something else than a relay answers on TCP "+port, "curl -v "+u.String()))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("HTTP status %d", resp.StatusCode), likely("another program answers on this port, or the reverse proxy does not pass "+identityPath+" on", "curl -i "+u.String()))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIdentityBody+1))
	other := likely("another program answers there", "curl -i "+u.String())
	switch {
	case err != nil && ctx.Err() != nil:
		return fail(errors.New("begins to answer and does not end in time"), hung(port))
	case err != nil:
		return fail(err, other)
	case len(body) > maxIdentityBody:
		return fail(fmt.Errorf("the answer is longer than %d bytes", maxIdentityBody), other)
	}
	var identity identityResponse
	if err := json.Unmarshal(body, &identity); err != nil {
		return fail(fmt.Errorf("the answer is not a relay's identity: %w", err), other)
	}
	if a.id, err = peer.Decode(identity.PeerID); err != nil {
		return fail(fmt.Errorf("peer_id %q: %w", identity.PeerID, err), other)
	}
	a.addrs = identity.Addresses
	return a
}

func hung(port string) diagnosis {
	return likely("the program on TCP "+port+" hangs, or is none that speaks HTTP", "ss -ltnp 'sport = :"+port+"'", "systemctl restart privstack-relay")
}

// dialled is an address of the relay and what came of it.
type dialled struct {
	probe
	family    family
	announced bool   // by the operator, rather than the host that was asked
	not       string // why it was not dialled; empty if it was
	wrong     bool   // and clients would fail there
}

// works tells whether this address is the relay's.
func (d dialled) works() bool { return d.not == "" && d.err == nil }

// quic shakes hands; the first call does it with all of the relay's addresses.
func (c *checker) quic(ctx context.Context, f family) checkStep {
	if c.dials == nil {
		asking, cancel := context.WithTimeout(ctx, checkAskTime)
		c.dials = c.addrsToDial(asking)
		cancel()
		ctx, cancel = context.WithTimeout(ctx, checkDialTime)
		defer cancel()
		var dialling sync.WaitGroup
		own := 0
		for i := range c.dials {
			if d := &c.dials[i]; d.not == "" {
				probe := c.a.probeAsAnother
				if own < maxCheckOwn {
					probe = c.a.probe
					own++
				}
				dialling.Go(func() { d.probe = probe(ctx, d.addr, c.id) })
			}
		}
		dialling.Wait()
	}
	var best *dialled
	for i, d := range c.dials {
		if d.family == f && d.not == "" && (best == nil || !best.works() && d.works()) {
			best = &c.dials[i]
		}
	}
	if best == nil {
		if s, missing := c.missing(f); missing {
			return s
		}
		return skipped("the relay lists no %v address", f)
	}
	var s checkStep
	switch {
	case !best.works() && c.instead(*best):
		return skipped("%s: %s, and others are announced", best.addr, short(best.err))
	case !best.works():
		s = failed(c.whyNoQUIC(best), "%s: %s", best.addr, short(best.err))
	case c.id == "":
		c.id = best.id
		s = passed("%s is %s, which nothing promised", best.addr, best.id)
	case best.id != c.id: // nothing was promised, and the other family's is another
		s = failed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.target.host), "%s is %s, not %s", best.addr, best.id, c.id)
	default:
		s = passed("%s answers with the promised peer ID", best.addr)
	}
	if s.Result == checkPassed && c.used == nil {
		c.used = &best.probe
	}
	s.Millis = millis(best.took)
	return s.with(map[string]any{"address": best.addr.String()})
}

// instead tells whether the operator says that the relay is elsewhere than at d: the
// endpoint that was asked may be behind a proxy.
func (c *checker) instead(d dialled) bool {
	return !d.announced && slices.ContainsFunc(c.dials, func(o dialled) bool { return o.announced })
}

// short is the part of a QUIC error that a reader can use.
func short(err error) string {
	if mismatch := (sec.ErrPeerIDMismatch{}); errors.As(err, &mismatch) {
		return fmt.Sprintf("is %s, and was promised to be %s", mismatch.Actual, mismatch.Expected)
	}
	if noAnswer(err) {
		return "no answer"
	}
	if refused(err) {
		return "the relay refuses the connection"
	}
	if errors.Is(err, network.ErrReset) {
		return "the stream was reset"
	}
	return err.Error()
}

func noAnswer(err error) bool {
	timeout := net.Error(nil) // which quic-go's timeouts are
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// refused tells whether the relay, at a limit, hung up: before the handshake, or
// with one of libp2p's codes after it.
func refused(err error) bool {
	if e := (*quic.TransportError)(nil); errors.As(err, &e) && e.ErrorCode == quic.ConnectionRefused {
		return true
	}
	e := (*quic.ApplicationError)(nil)
	return errors.As(err, &e) && (e.ErrorCode == quic.ApplicationErrorCode(network.ConnResourceLimitExceeded) || e.ErrorCode == quic.ApplicationErrorCode(network.ConnRateLimited))
}

func full() diagnosis {
	return likely("the relay is at its limit of clients, or of clients from this address: see --max-clients and --max-clients-per-ip", "journalctl -u privstack-relay --since -1h")
}

func (c *checker) whyNoQUIC(d *dialled) diagnosis {
	port, _ := d.addr.ValueForProtocol(ma.P_UDP)
	switch answers := c.listed != nil; {
	case errors.As(d.err, new(sec.ErrPeerIDMismatch)):
		return likely("another relay, or one with another key file, answers on UDP "+port+": clients will refuse it", "ss -lunp 'sport = :"+port+"'")
	case refused(d.err):
		return full()
	case noAnswer(d.err) && (answers || c.target.url == nil):
		return likely("UDP "+port+" is closed over "+d.family.String()+" in the firewall of the machine or of its provider", "ufw allow "+port+"/udp", "systemctl status privstack-relay")
	case noAnswer(d.err):
		return likely("the relay is not running, or UDP "+port+" is closed in a firewall", "systemctl status privstack-relay", "ufw allow "+port+"/udp")
	}
	return likely("something else than a relay answers on UDP "+port, "ss -lunp 'sport = :"+port+"'")
}

// addrsToDial are the relay's addresses as clients would find them: those that
// the endpoint lists, 0.0.0.0 and :: replaced with the host that was asked.
func (c *checker) addrsToDial(ctx context.Context) (dials []dialled) {
	dialling := 0
	add := func(d dialled) {
		if slices.ContainsFunc(dials, func(o dialled) bool { return o.addr.Equal(d.addr) }) {
			return
		}
		if d.not == "" {
			if dialling == maxCheckDials {
				d.not = "not dialled, there are too many"
			} else {
				dialling++
			}
		}
		dials = append(dials, d)
	}
	here := func(ips []netip.Addr, rest ma.Multiaddr, announced bool) {
		for _, ip := range ips {
			ip = ip.Unmap()
			d := dialled{family: familyOf(ip), announced: announced}
			d.addr = ipAddr(ip).Encapsulate(rest)
			switch {
			case announced && c.elsewhere(ip):
				// Nor is it our business to dial what is local to us.
				d.not, d.wrong = "a private address, which only its own network can dial", true
			case routeTo(ip) != nil:
				d.not = "this machine has no " + d.family.String()
			}
			add(d)
		}
	}
	ours := slices.Concat(c.ips[ipv4], c.ips[ipv6])

	switch {
	case c.target.addr != nil:
		here(ours, c.target.addr[1:], false)
		return dials
	case c.listed == nil: // the endpoint did not answer: the default port
		here(ours, ma.StringCast(fmt.Sprintf("/udp/%d/quic-v1", checkPort)), false)
		return dials
	}
	for i, s := range c.listed {
		if i == maxCheckListed {
			break
		}
		addr, err := ma.NewMultiaddr(s)
		if err == nil {
			addr, _ = peer.SplitAddr(addr)
		}
		if err != nil || len(addr) != 3 || !(manet.IsThinWaist(addr) || isDNS(addr)) || addr[1].Protocol().Code != ma.P_UDP || addr[2].Protocol().Code != ma.P_QUIC_V1 {
			continue // other relays may have other transports
		}
		switch ip, err := manet.ToIP(addr); {
		case err != nil:
			named, _ := lookup(ctx, addr[0].Value())
			named = slices.DeleteFunc(named, func(ip netip.Addr) bool { return !standsFor(addr, ip) })
			if len(named) == 0 {
				add(dialled{probe: probe{addr: addr}, announced: true, not: "the name has no address", wrong: true})
			}
			here(named[:min(len(named), 2*maxCheckIPs)], addr[1:], true)
		case ip.IsUnspecified():
			f := ipv6
			if ip.To4() != nil {
				f = ipv4
			}
			here(c.ips[f], addr[1:], false)
			if len(c.ips[f]) == 0 {
				add(dialled{probe: probe{addr: addr}, family: f, not: fmt.Sprintf("%s has no %v address", c.target.host, f)})
			}
		default:
			ip, _ := netip.AddrFromSlice(ip)
			here([]netip.Addr{ip}, addr[1:], true)
		}
	}
	return dials
}

// elsewhere tells whether ip is local to a network that the host which was asked
// is not in.
func (c *checker) elsewhere(ip netip.Addr) bool {
	ours := slices.Concat(c.ips[ipv4], c.ips[ipv6])
	if slices.ContainsFunc(ours, netip.Addr.IsLoopback) {
		return false
	}
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return ip.IsLoopback() || ip.IsMulticast() || ip == broadcast || isLocal(ip) && !slices.ContainsFunc(ours, isLocal)
}

// isLocal tells whether ip means something in one network alone.
func isLocal(ip netip.Addr) bool {
	return manet.IsPrivateAddr(ipAddr(ip))
}

func ipAddr(ip netip.Addr) ma.Multiaddr {
	return ma.StringCast(fmt.Sprintf("/ip%d/%s", familyOf(ip), ip))
}

// addresses sums up what came of each address that the endpoint lists.
func (c *checker) addresses(context.Context) checkStep {
	if c.used == nil {
		c.blocked = "needs QUIC"
	}
	if c.listed == nil {
		return skipped("the identity endpoint lists them")
	}
	var s checkStep
	bad, good := 0, 0
	for _, d := range c.dials {
		switch {
		case d.works():
			good++
			s.Lines = append(s.Lines, fmt.Sprintf("✓ %s  %.0f ms", d.addr, millis(d.took)))
		case d.not != "" && !d.wrong:
			s.Lines = append(s.Lines, fmt.Sprintf("– %s  %s", d.addr, d.not))
		case d.not == "" && c.instead(d):
			s.Lines = append(s.Lines, fmt.Sprintf("– %s  %s, and others are announced", d.addr, short(d.err)))
		default:
			bad++
			why := d.not
			if why == "" {
				why = short(d.err)
			}
			s.Lines = append(s.Lines, fmt.Sprintf("✗ %s  %s", d.addr, why))
		}
	}
	s.Result, s.Detail = checkPassed, fmt.Sprintf("%d listed, %d answer", len(c.listed), good)
	if len(c.listed) > maxCheckListed {
		s.Detail += fmt.Sprintf("; only the first %d were looked at", maxCheckListed)
	}
	switch {
	case bad > 0:
		s.Result, s.Cause = checkFailed, "clients are told addresses at which the relay does not answer: see --announce, and the firewall for that family"
	case good == 0:
		s.Result, s.Cause = checkFailed, "none of them is a QUIC address that can be dialled from here"
	}
	return s.with(map[string]any{"listed": len(c.listed), "answer": good, "fail": bad})
}

// identify compares what the relay says of itself.
func (c *checker) identify(context.Context) (s checkStep) {
	id, err := c.used.identity, c.used.identifyErr
	switch {
	case refused(err):
		c.blocked = "needs a place at the relay"
		s = failed(full(), "the relay closes the connection after the handshake")
	case err != nil:
		s = failed(likely("the relay hangs or is overloaded", "systemctl restart privstack-relay"), "%s", short(err))
	case id.GetProtocolVersion() != protocolVersion:
		s = failed(likely("a libp2p node, but no PrivStack relay"), "speaks %q (agent %q), not %s", clean(id.GetProtocolVersion()), clean(id.GetAgentVersion()), protocolVersion)
	default:
		s = passed("%s, agent %s", id.GetProtocolVersion(), clean(id.GetAgentVersion()))
	}
	s.Millis = millis(c.used.identifyTook)
	return s.with(map[string]any{"protocol_version": clean(id.GetProtocolVersion()), "agent_version": clean(id.GetAgentVersion())})
}

// clients connects the two throw-away identities.
func (c *checker) clients(ctx context.Context) checkStep {
	for _, h := range []*checkHost{c.a, c.b} {
		if err := h.dial(ctx, c.id, c.used.addr); err != nil {
			c.blocked = "needs two clients"
			why := likely("the relay hangs, or the path to it loses packets", "systemctl status privstack-relay")
			if refused(err) {
				why = full()
			}
			return failed(why, "%s", short(err))
		}
	}
	return passed("two throw-away clients are connected")
}

// whyNoAnswer explains a DHT request or reservation that got none.
func (c *checker) whyNoAnswer(ctx context.Context, what string) diagnosis {
	if ctx.Err() != nil {
		return likely("the relay hangs or is overloaded", "systemctl restart privstack-relay")
	}
	if c.a.Network().Connectedness(c.id) != network.Connected || c.b.Network().Connectedness(c.id) != network.Connected {
		return full()
	}
	return likely("no PrivStack relay, or one of another version: it does not serve "+what, "privstack-relay --version")
}

// dht asks for a client's own ID, which all clients do first, and for its mate,
// which is how two homes meet.
func (c *checker) dht(ctx context.Context) checkStep {
	// Both, because a client is in only when it has been answered: a handshake is
	// done before the relay has taken the connection.
	for _, h := range []*checkHost{c.b, c.a} {
		if _, err := h.ask(ctx, c.id, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(h.ID()), 0)); err != nil {
			return failed(c.whyNoAnswer(ctx, string(kadProtocol)), "FIND_NODE: %s", short(err))
		}
	}
	resp, err := c.a.ask(ctx, c.id, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(c.b.ID()), 0))
	if err != nil {
		return failed(c.whyNoAnswer(ctx, string(kadProtocol)), "FIND_NODE: %s", short(err))
	}
	for _, p := range resp.CloserPeers {
		if addrs := p.Addresses(); peer.ID(p.Id) == c.b.ID() && len(addrs) > 0 {
			return passed("names one client to the other, at %s", addrs[0]).with(map[string]any{"address": addrs[0].String()})
		}
	}
	return failed(likely("no PrivStack relay, or the old one: devices in two homes will not find each other", "privstack-relay --version"),
		"answers, but does not name a client that is connected")
}

// record puts a record as clients do and has the other client get it.
func (c *checker) record(ctx context.Context) checkStep {
	key := make([]byte, 32)
	rand.Read(key)
	key = append([]byte("/privstack/syncgroup/"), key...)
	value, err := json.Marshal(map[string]any{"device_name": "privstack-relay check", "addresses": []string{}, "timestamp": time.Now().Unix()})
	if err != nil {
		panic(err) // these types always marshal
	}
	extra := protowire.AppendTag(nil, publisherField, protowire.BytesType)
	extra = protowire.AppendBytes(extra, []byte(c.a.ID()))
	extra = protowire.AppendTag(extra, ttlField, protowire.VarintType)
	extra = protowire.AppendVarint(extra, checkRecordTTL)
	rec := &recpb.Record{Key: key, Value: value}
	rec.ProtoReflect().SetUnknown(extra)

	put := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	put.Record = rec
	if _, err := c.a.ask(ctx, c.id, put); err != nil {
		return failed(c.whyNoAnswer(ctx, "records under "+recordPrefix), "PUT_VALUE: %s", short(err))
	}
	resp, err := c.b.ask(ctx, c.id, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0))
	if err != nil {
		return failed(c.whyNoAnswer(ctx, "records under "+recordPrefix), "GET_VALUE: %s", short(err))
	}
	got := resp.GetRecord()
	wrong := likely("no PrivStack relay, or a damaged one: clients ignore such a record", "privstack-relay --version")
	switch {
	case got == nil:
		return failed(wrong, "what was put is not found")
	case !bytes.Equal(got.GetKey(), key) || !bytes.Equal(got.GetValue(), value):
		return failed(wrong, "what comes back is not what was put")
	}
	if fields, err := knownExtra(got.ProtoReflect().GetUnknown()); err != nil || !bytes.Equal(fields, extra) {
		return failed(wrong, "it comes back without its publisher and ttl (fields %d and %d)", publisherField, ttlField)
	}
	return passed("put by one client, got by the other, byte for byte with publisher and ttl")
}

// reserve takes a place at the relay for the second client.
func (c *checker) reserve(ctx context.Context) checkStep {
	got, err := c.b.reserve(ctx, c.id)
	if err != nil {
		e := circuitclient.ReservationError{Reason: err.Error()}
		errors.As(err, &e)
		switch {
		case ctx.Err() != nil:
			return failed(c.whyNoAnswer(ctx, ""), "no answer")
		case e.Status != circuitpb.Status_CONNECTION_FAILED:
			return failed(likely("the relay is full, or is about to stop", "journalctl -u privstack-relay --since -1h"), "the relay says %v: %s", e.Status, e.Reason)
		case e.Unwrap() != nil:
			return failed(c.whyNoAnswer(ctx, "the circuit relay"), "%s", short(e.Unwrap()))
		}
		return failed(c.whyNoAnswer(ctx, "the circuit relay"), "%s", e.Reason)
	}
	c.reservation = got
	var addrs []string
	private := true
	for _, a := range got.Addrs[:min(len(got.Addrs), maxOfferedAddrs)] {
		a, _ = peer.SplitAddr(a)
		if len(a) > 0 {
			addrs = append(addrs, a.String())
			private = private && manet.IsPrivateAddr(a)
		}
	}
	values := map[string]any{"addresses": addrs, "duration_s": int(got.LimitDuration.Seconds()), "data_bytes": got.LimitData}
	announce := inUnit("--announce " + c.target.host)
	switch {
	case len(addrs) == 0:
		s := failed(likely("the relay does not know its address: deployed clients refuse such a reservation", announce), "accepted, but without an address")
		return s.with(values)
	case private && !manet.IsPrivateAddr(c.used.addr):
		s := failed(likely("the relay is behind a NAT and knows its private address only: nobody outside can use these", announce), "accepted, but its addresses are all private")
		s.Lines = addrs
		return s.with(values)
	}
	s := passed("accepted; one circuit may last %s and carry %s", limit(got.LimitDuration, got.LimitDuration == 0), limit(sizeText(got.LimitData), got.LimitData == 0))
	s.Lines = addrs
	return s.with(values)
}

// inUnit is how to add flags to the relay's command line.
func inUnit(flags string) string {
	return "systemctl edit --full privstack-relay  # add " + flags
}

func limit(v any, none bool) string {
	if none {
		return "without limit"
	}
	return fmt.Sprint(v)
}

func sizeText(n uint64) string {
	if n >= 1<<30 {
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%.0f KiB", float64(n)/(1<<10))
}

// circuit has the clients meet through the relay.
func (c *checker) circuit(ctx context.Context) checkStep {
	if c.reservation == nil {
		return skipped("needs a reservation")
	}
	direct, err := c.a.ping(ctx, c.id)
	if err != nil {
		return failed(c.whyNoAnswer(ctx, "ping"), "ping: %s", short(err))
	}
	via := c.used.addr.Encapsulate(ma.StringCast("/p2p/" + c.id.String() + "/p2p-circuit"))
	if err := c.a.dial(ctx, c.b.ID(), via); err != nil {
		return failed(likely("the relay is at its limit of circuits, is about to stop, or hangs", "journalctl -u privstack-relay --since -1h"), "no circuit: %s", short(err))
	}
	e, err := c.a.echo(ctx, c.b.ID())
	if err != nil {
		why := likely("the path to the relay is slow or loses packets")
		if data := c.reservation.LimitData; data > 0 && data < 2*checkEchoBytes {
			why = likely(fmt.Sprintf("the relay cuts circuits at %d bytes, and a sync message has up to 16 MiB", data), inUnit("--circuit-bytes 1GiB"))
		}
		return failed(why, "cut after %d of %d bytes: %s", e.bytes, checkEchoBytes, short(err))
	}
	rate := float64(checkEchoBytes) / (1 << 20) / e.took.Seconds()
	added := max(0, e.rtt-direct) // on a fast path the difference is noise
	return passed("1 MiB echoed at %.1f MiB/s; round trip %.1f ms, %.1f more than to the relay", rate, millis(e.rtt), millis(added)).
		with(map[string]any{"mib_per_s": rate, "circuit_rtt_ms": millis(e.rtt), "relay_rtt_ms": millis(direct), "added_ms": millis(added)})
}

// seenAs is the address under which a probe was seen, as IP and port.
func (p probe) seenAs() (netip.AddrPort, error) {
	if p.identity == nil {
		return netip.AddrPort{}, errors.New("identify gave no answer")
	}
	addr, err := ma.NewMultiaddrBytes(p.identity.GetObservedAddr())
	if err != nil {
		return netip.AddrPort{}, err
	}
	return udpAddr(addr)
}

func udpAddr(addr ma.Multiaddr) (netip.AddrPort, error) {
	udp, _, err := quicreuse.FromQuicMultiaddr(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(udp.AddrPort().Addr().Unmap(), udp.AddrPort().Port()), nil
}

// observed is what the relay tells others of us.
func (c *checker) observed(context.Context) checkStep {
	seen, err := c.used.seenAs()
	if err != nil {
		return failed(likely("no PrivStack relay: devices in two homes will not find each other"), "the relay tells no address: %v", err)
	}
	values := map[string]any{"address": seen.String()}
	if isLocal(seen.Addr()) && !manet.IsPrivateAddr(c.used.addr) {
		return failed(likely("a proxy or NAT before the relay, such as a container's port forwarding, hides its clients: homes behind NATs will not meet", "docker run --network host ..."),
			"the relay sees us at the private %s", seen).with(values)
	}
	return passed("the relay sees us at %s", seen).with(values)
}

// nat says what our own NAT does to the socket that was probed from. That is no
// fault of the relay's, so it never fails. One relay at one address can't tell
// whether another destination would see the same port.
func (c *checker) nat(ctx context.Context) checkStep {
	seen, err := c.used.seenAs()
	if err != nil {
		return skipped("needs the observed address")
	}
	at, err := udpAddr(c.used.local)
	if err != nil {
		return skipped("our own address is unknown: %v", err)
	}
	values := map[string]any{"local_port": at.Port(), "port_kept": at.Port() == seen.Port()}
	if at.Port() == seen.Port() && isOurs(seen.Addr()) {
		values["nat"] = false
		return passed("none: that is this machine's own address").with(values)
	}
	values["nat"] = true
	kept := "our NAT keeps the port"
	if at.Port() != seen.Port() {
		kept = fmt.Sprintf("our NAT does not keep the port (%d became %d)", at.Port(), seen.Port())
	}

	// Other addresses of the relay, asked from the same socket, are other destinations.
	for _, d := range c.dials {
		other, err := d.seenAs()
		local, localErr := udpAddr(d.local)
		if !d.works() || err != nil || localErr != nil || local != at || d.addr.Equal(c.used.addr) {
			continue
		}
		if other != seen {
			values["same_for_destinations"] = "no"
			return skipped("our NAT shows each destination another address (%s and %s): from here, most connections will need the relay's circuits", seen, other).with(values)
		}
		values["same_for_destinations"] = "yes"
	}
	if values["same_for_destinations"] == "yes" {
		return passed("%s, and shows two of the relay's addresses the same: %s", kept, seen).with(values)
	}
	values["same_for_destinations"] = "unknown"
	second := ""
	if p := c.b.probe(ctx, c.used.addr, c.id); p.err == nil {
		if other, err := p.seenAs(); err == nil {
			if other.Addr() != seen.Addr() {
				second = "; a second socket is seen at another address, " + other.Addr().String()
			} else if local, err := udpAddr(p.local); err == nil && (local.Port() == other.Port()) != (at.Port() == seen.Port()) {
				second = "; for a second socket it is the other way round"
			} else {
				second = "; a second socket, likewise"
			}
		}
	}
	return passed("%s%s. Whether another destination would see the same, one relay address can't tell", kept, second).with(values)
}

// isOurs tells whether an interface of this machine has ip.
func isOurs(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		return err == nil && prefix.Addr().Unmap() == ip
	})
}
