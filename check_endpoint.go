package main

// The first steps of `check`: which addresses the host has, and what its identity
// endpoint says.

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	maxCheckIPs     = 2               // addresses of one name that are used, in each family
	maxCheckListed  = maxAnnounce + 2 // addresses that are read: the announced ones and two sockets
	maxIdentityBody = 64 << 10        // bytes that are read; eight names of 253 characters take 3 KiB
)

// checkTarget is the relay as the operator named it. parseCheckTarget makes it.
type checkTarget struct {
	given string       // what the operator wrote
	host  string       // a DNS name, or an IP address without brackets
	url   *url.URL     // the identity endpoint; nil if the operator gave a bootstrap address
	addr  ma.Multiaddr // that bootstrap address, without /p2p
	id    peer.ID      // and its peer ID
}

// endpointCheck finds the target's IP addresses and asks its identity endpoint.
type endpointCheck struct {
	checkTarget
	ips     map[string][]netip.Addr // at most maxCheckIPs in each family
	lacks   map[string]string       // why that family can't be checked; "" if it can
	answers map[string]*endpointAnswer

	relayID peer.ID  // the target's ID, else the answer's, IPv4's before IPv6's; "" if there is none
	listed  []string // the addresses in that answer; nil if there is none
}

// resolve finds the host's addresses, and which of them this machine can send to.
func (c *endpointCheck) resolve(ctx context.Context) checkStep {
	kind := ma.P_DNS
	if c.addr != nil {
		kind = c.addr[0].Protocol().Code
	}
	found, err := lookupIPs(ctx, kind, c.host)
	if err != nil {
		why := "the name is mistyped, or its DNS record is missing or has not spread yet"
		if e := (*net.DNSError)(nil); errors.As(err, &e) && !e.IsNotFound {
			why = "this machine is offline, or its DNS server does not answer"
		}
		return stepFailed(likely(why, "getent ahosts "+c.host),
			"%s has no address: %v", c.host, err).blocking("needs an address of " + c.host)
	}
	c.ips, c.lacks = make(map[string][]netip.Addr), make(map[string]string)
	var all []string
	for _, ip := range found {
		if f := familyOf(ip); len(c.ips[f]) < maxCheckIPs {
			c.ips[f] = append(c.ips[f], ip)
			all = append(all, ip.String())
		}
	}
	for _, f := range []string{ipv4, ipv6} {
		c.lacks[f] = fmt.Sprintf("%s has no %s address", c.host, f)
		if len(c.ips[f]) > 0 {
			c.lacks[f] = routeTo(c.ips[f][0])
		}
	}
	s := stepPassed("%s", strings.Join(all, ", "))
	if c.lacks[ipv4] != "" && c.lacks[ipv6] != "" {
		s = stepFailed(likely("this machine is offline, or has no address of that family", "ip route"),
			"no route to %s", strings.Join(all, ", ")).blocking("needs a route to " + c.host)
	} else if net.ParseIP(c.host) != nil {
		s = stepSkipped("%s is an IP address: there is nothing to look up", c.host)
	}
	return s.with(map[string]any{"addresses": all})
}

// ask asks over both families at once.
func (c *endpointCheck) ask(ctx context.Context) {
	c.relayID, c.answers = c.id, make(map[string]*endpointAnswer)
	if c.url == nil {
		return
	}
	var asking sync.WaitGroup
	for f, ips := range c.ips {
		if c.lacks[f] == "" {
			a := new(endpointAnswer)
			c.answers[f] = a
			asking.Go(func() { a.ask(ctx, c.url, ips[0]) })
		}
	}
	asking.Wait()
	for _, f := range []string{ipv6, ipv4} {
		if a := c.answers[f]; a != nil && a.err == nil {
			c.relayID, c.listed = a.id, a.addrs
		}
	}
}

// over says how the endpoint answered over f.
func (c *endpointCheck) over(f string) checkStep {
	if c.url == nil {
		return stepSkipped("not needed: the bootstrap address has the peer ID")
	}
	if why := c.lacks[f]; why != "" {
		return stepSkipped("%s", why)
	}
	a := c.answers[f]
	at := net.JoinHostPort(c.ips[f][0].String(), c.url.Port())
	s := stepPassed("%s: %s", at, a.id)
	if a.err != nil {
		s = stepFailed(a.why, "%s: %v", at, a.err)
	} else if a.id != c.relayID {
		s = stepFailed(c.whyTwoRelays(), "%s: %s, but over IPv4 it is %s", at, a.id, c.relayID)
	}
	s.Millis = millis(a.took)
	return s
}

func (c *endpointCheck) whyTwoRelays() diagnosis {
	return likely("the addresses of this name belong to two different relays", "getent ahosts "+c.host)
}

// The address families, as operators call them.
const ipv4, ipv6 = "IPv4", "IPv6"

func familyOf(ip netip.Addr) string {
	if ip.Is4() {
		return ipv4
	}
	return ipv6
}

// lookupIPs returns the addresses of host, which is an IP address or a name of that
// kind: ma.P_DNS4, ma.P_DNS6 or any other for both families.
func lookupIPs(ctx context.Context, kind int, host string) ([]netip.Addr, error) {
	network := map[int]string{ma.P_DNS4: "ip4", ma.P_DNS6: "ip6"}[kind]
	ips, err := net.DefaultResolver.LookupNetIP(ctx, cmp.Or(network, "ip"), host)
	for i, ip := range ips {
		ips[i] = ip.Unmap().WithZone("") // multiaddrs have no zones
	}
	return ips, err
}

// routeTo says why this machine can't send to ip, or "". Nothing is sent: connecting
// a UDP socket only looks up the way.
func routeTo(ip netip.Addr) string {
	conn, err := net.Dial("udp", net.JoinHostPort(ip.String(), "9"))
	if err != nil { // err names addresses, its cause does not
		return fmt.Sprintf("this machine has no %s: %v", familyOf(ip), cmp.Or(errors.Unwrap(err), err))
	}
	conn.Close()
	return ""
}

// wsaConnRefused is what Windows says for ECONNREFUSED, which Go made up there.
// https://learn.microsoft.com/windows/win32/winsock/windows-sockets-error-codes-2
const wsaConnRefused = syscall.Errno(10061)

// endpointAnswer is what the identity endpoint says over one family.
type endpointAnswer struct {
	id    peer.ID
	addrs []string // not nil if there is an answer
	took  time.Duration
	err   error     // why there is no answer
	why   diagnosis // what is then likely wrong
}

// ask gets the identity at u from ip, whatever address its host name has.
func (a *endpointAnswer) ask(ctx context.Context, u *url.URL, ip netip.Addr) {
	begun := time.Now()
	dialer := net.Dialer{Timeout: checkAskTime} // shorter than ctx, so that a timeout shows where it was
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(addr)
			return dialer.DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
		},
		MaxResponseHeaderBytes: 16 << 10,
		DisableKeepAlives:      true,
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 || req.URL.Hostname() != u.Hostname() {
			return fmt.Errorf("redirected to %s", req.URL)
		}
		return nil
	}}
	if a.err = a.get(ctx, client, u); a.err != nil {
		a.explain(u)
	}
	a.took = time.Since(begun)
}

// get fills a with the answer at u.
func (a *endpointAnswer) get(ctx context.Context, client *http.Client, u *url.URL) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "privstack-relay-check/"+buildVersion())
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return httpStatus(resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIdentityBody+1))
	if err != nil {
		return err
	}
	if len(body) > maxIdentityBody {
		return fmt.Errorf("the answer is longer than %d bytes", maxIdentityBody)
	}
	var answer identityResponse
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("the answer is not a relay's identity: %w", err)
	}
	if a.id, err = peer.Decode(answer.PeerID); err != nil {
		return fmt.Errorf("peer_id %q: %w", answer.PeerID, err)
	}
	a.addrs = append([]string{}, answer.Addresses[:min(len(answer.Addresses), maxCheckListed)]...)
	return nil
}

// httpStatus is the status of an answer that should have been 200.
type httpStatus int

func (s httpStatus) Error() string { return fmt.Sprintf("HTTP status %d", int(s)) }

// isFromProxy reports whether s is how a reverse proxy says that it does not reach the
// relay. The relay's identity endpoint never answers so.
func (s httpStatus) isFromProxy() bool {
	return s == http.StatusBadGateway || s == http.StatusServiceUnavailable || s == http.StatusGatewayTimeout
}

// explain makes a.err fit to print, and says what is likely wrong.
func (a *endpointAnswer) explain(u *url.URL) {
	port := u.Port()
	if e := (*url.Error)(nil); errors.As(a.err, &e) {
		a.err = e.Err // without the URL, which is known
	}
	connected, timedOut, badTLS := true, isTimeout(a.err), errors.As(a.err, new(*tls.CertificateVerificationError))
	if e := (*net.OpError)(nil); errors.As(a.err, &e) {
		connected = e.Op != "dial"
		badTLS = e.Op == "remote error" // crypto/tls: an alert, as from a proxy without this name
		a.err = e.Err                   // without the addresses
	}
	status := httpStatus(0)
	errors.As(a.err, &status)
	refused := errors.Is(a.err, syscall.ECONNREFUSED) || errors.Is(a.err, wsaConnRefused)
	switch {
	case status.isFromProxy():
		a.why = likely("the reverse proxy answers, but does not reach the relay behind it: the relay is not running, or the proxy has another port than its --http-port", tryStatus)
	case refused && u.Scheme == "https":
		a.why = likely("nothing listens on TCP "+port+": the reverse proxy is not running", "systemctl status caddy nginx")
	case timedOut && !connected:
		a.err = errors.New("no answer")
		a.why = likely("a firewall, on the machine or at its provider, blocks TCP "+port, append(tryOpen(port, "tcp"), tryStatus)...)
	case timedOut:
		a.err = errors.New("accepts the connection but does not answer in time")
		a.why = likely("the program on TCP "+port+" hangs, or does not speak HTTP", "ss -ltnp 'sport = :"+port+"'", "systemctl restart privstack-relay")
	case refused:
		a.why = likely("nothing listens on TCP "+port+": the relay is not running, or it has another --http-port", tryStatus)
	case !connected:
		a.why = likely("the machine is down, or a firewall rejects TCP "+port, tryOpen(port, "tcp")...)
	case errors.Is(a.err, http.ErrSchemeMismatch):
		a.why = likely("TCP "+port+" speaks HTTP without TLS: write http:// instead of https://", "curl -v "+u.String())
	case badTLS:
		a.why = likely("the reverse proxy has no valid certificate for "+u.Hostname(), "curl -v "+u.String())
	default:
		a.why = likely("another program answers on TCP "+port+", or the reverse proxy does not forward "+identityRoute, "curl -v "+u.String())
	}
}
