package main

// The last steps of `check`: two clients publish, find and reach each other.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// The last steps of `check`: two clients publish, find and reach each other.

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
	extra := newExtras(c.a.ID(), checkRecordTTL).encoded
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
	if fields, err := readExtras(got); err != nil || !bytes.Equal(fields.encoded, extra) {
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
