package main

// The libp2p node, put together: host, sockets, DHT and circuit relay, and the order
// in which they start and close. It imports neither net/http, flag nor os.

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/prometheus/client_golang/prometheus"
)

// relay is a running node. Make it with startRelay, end it with drain and close.
type relay struct {
	limits limits

	tally      tally
	names      *names
	reach      *reach
	peers      *peers
	groups     groups
	records    *recordStore
	federation *federation
	circuits   *circuits
	bridge     *bridge
	sockets    quicSockets

	host    host.Host
	dht     *dht.IpfsDHT
	service *circuit.Relay

	// registry gathers the metrics, go-libp2p's among them. It is nil unless
	// the operator asked for them.
	registry *prometheus.Registry

	// broken gets the reason, once, if the node stops by itself.
	broken chan error
}

// startRelay returns when both sockets are bound and everything serves.
func startRelay(cfg config, key ed25519.PrivateKey, log *slog.Logger) (*relay, error) {
	return startRelayWithin(newLimits(cfg.maxClients, cfg.maxClientsPerIP), cfg, key, log)
}

func startRelayWithin(lim limits, cfg config, key ed25519.PrivateKey, log *slog.Logger) (*relay, error) {
	privKey, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("identity key: %w", err)
	}
	port := cfg.port
	if port == 0 {
		if port, err = freePort(); err != nil {
			return nil, fmt.Errorf("find a free UDP port: %w", err)
		}
	}
	r, err := newRelay(lim, cfg, privKey, port, log)
	if err != nil {
		return nil, err
	}
	if err := r.start(cfg, privKey, port, log); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// newRelay puts the rooms together. Nothing runs yet, so there is nothing to close.
func newRelay(lim limits, cfg config, key crypto.PrivKey, port int, log *slog.Logger) (*relay, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("identity key: %w", err)
	}
	r := &relay{
		limits:  lim,
		names:   newNames(cfg.resolver(), log),
		peers:   newPeers(log),
		records: newRecordStore(lim.records()),
		broken:  make(chan error, 1),
	}
	announce, err := announcedAddrs(cfg.announce, port, self)
	if err != nil {
		return nil, err
	}
	r.names.add(announce...)
	if r.reach, err = newReach(announce, r.names, log); err != nil {
		return nil, fmt.Errorf("list interface addresses: %w", err)
	}
	if r.federation, err = newFederation(self, cfg.bootstrap, r.peers, r.names, log); err != nil {
		return nil, err
	}
	r.circuits = newCircuits(lim, log, &r.tally, r.peers.reserve)
	r.bridge = newBridge(log, &r.tally, lim, r.peers, func(id peer.ID) bool { return r.federation.get(id) != nil })
	r.bridge.maxBytes, r.bridge.maxAge = cfg.circuitBytes, cfg.circuitDuration
	if cfg.maxBandwidth > 0 { // circuits and bridges share it
		r.bridge.bandwidth = newBandwidth(cfg.maxBandwidth)
	}
	r.peers.left = r.groups.leave

	r.sockets.tally, r.sockets.maxUnproven = &r.tally, lim.unproven()
	r.sockets.pieces = newPieces(newBudgets(lim), &r.tally)
	r.sockets.networks.most, r.sockets.networks.free, r.sockets.networks.unproven = lim.perNetwork, lim.freeNetworks(), lim.unprovenRate()
	gate := newGate()
	r.sockets.pieces.flooded = gate.spend
	r.sockets.tap = func(s udpSocket) tapped { return gate.behind(r.bridge.tap(s)) }
	r.sockets.ids = r.bridge // so that the bridge knows which packets are quic-go's
	r.sockets.testOnlyPlain = cfg.testOnlyPlainSockets
	if cfg.metrics != "" {
		r.registry = newRegistry(r.counters)
	}
	return r, nil
}

// start starts the rooms from the top down, so that the first client meets a relay that
// is whole. If it fails, r has to be closed.
func (r *relay) start(cfg config, key crypto.PrivKey, port int, log *slog.Logger) (err error) {
	if r.host, err = r.newHost(key); err != nil {
		return fmt.Errorf("start libp2p: %w", err)
	}
	kad := &kadServer{&answers{r.peers, r.federation, &r.groups, r.bridge}, &r.groups, r.records, r.peers, &r.tally}
	if r.dht, err = kad.serve(r.host); err != nil {
		return fmt.Errorf("start dht: %w", err)
	}
	if err := r.peers.follow(r.host); err != nil {
		return fmt.Errorf("follow peers: %w", err)
	}
	r.bridge.follow(r.host.Network())
	if r.service, err = r.circuits.serve(r.host, r.limits, cfg, r.bridge.bandwidth); err != nil {
		return fmt.Errorf("start circuit relay: %w", err)
	}
	r.federation.follow(r.host)
	if err := r.sockets.listen(r.host, port, log); err != nil {
		return err
	}
	r.host.Network().Notify(&network.NotifyBundle{ListenCloseF: func(_ network.Network, a ma.Multiaddr) {
		select { // when the host closes there is nobody to tell, and no need
		case r.broken <- fmt.Errorf("listener on %s stopped", a):
		default:
		}
	}})
	r.names.follow(r.reach.update)
	if err := r.reach.follow(r.host); err != nil {
		return fmt.Errorf("follow addresses: %w", err)
	}
	r.federation.connect() // from the sockets that listen
	return nil
}

// newHost returns a host that listens on nothing yet.
func (r *relay) newHost(key crypto.PrivKey) (host.Host, error) {
	onBus, onSwarm, onResources := libp2pMetrics(r.registry, &r.tally)
	relays := 0
	if len(r.federation.named) > 0 {
		relays = maxRelays // which they may vouch for
	}
	// At a limit it refuses newcomers. There is no connection manager, which would
	// make room by closing connections of clients that are already in.
	manager, err := rcmgr.NewResourceManager(
		rcmgr.NewFixedLimiter(r.limits.resourceLimits(relays)),
		append(r.limits.resourceOptions(), onResources...)...)
	if err != nil {
		return nil, err
	}
	resources := newestFirst{
		newFairStreams(manager, r.limits.unshared(), &r.tally),
		func(id peer.ID) []network.Conn { return r.host.Network().ConnsToPeer(id) },
	}
	transport, err := r.sockets.newTransport(key, r.federation, resources)
	if err != nil {
		return nil, errors.Join(err, resources.Close())
	}
	h, err := newQUICHost(hostParts{
		key:       key,
		transport: transport,
		gater:     r.federation,
		resources: resources,
		addrBook: func(self peer.ID, store addrStore) peerstore.Peerstore {
			return addrBook{store, self, r.peers, r.federation.addrs}
		},
		advertise:    r.reach.addrs,
		busOptions:   onBus,
		swarmOptions: append(onSwarm, swarm.WithMultiaddrResolver(r.names)),
		options: basichost.HostOpts{
			ProtocolVersion:      protocolVersion,
			UserAgent:            agentVersion(),
			EnablePing:           true,
			EnableMetrics:        r.registry != nil,
			PrometheusRegisterer: r.registry,
		},
	})
	if err != nil {
		return nil, err // not h: a nil *quicHost makes a host.Host that is not nil
	}
	return h, nil
}

func (r *relay) peerID() string { return r.host.ID().String() }

// socketAddrs returns the addresses of the sockets.
func (r *relay) socketAddrs() []string {
	sockets := r.host.Network().ListenAddresses()
	slices.SortFunc(sockets, ma.Multiaddr.Compare) // IPv4 first, as the old relay had it
	return strs(sockets)
}

// reachableAddrs returns the addresses for clients to bootstrap from, without /p2p,
// best first.
func (r *relay) reachableAddrs() []string {
	return strs(r.reach.now())
}

// listedAddrs returns the addresses that the identity endpoint lists: the announced ones,
// then those of the sockets. Where IPv6 is switched off, a socket can be bound to it, but
// nobody reaches it.
func (r *relay) listedAddrs() []string {
	sockets := r.socketAddrs()
	if !slices.ContainsFunc(*r.reach.own.Load(), isIPv6) {
		sockets = slices.DeleteFunc(sockets, func(s string) bool { return strings.HasPrefix(s, "/ip6/") })
	}
	return append(strs(r.names.withIPs(r.reach.announce)), sockets...)
}

// maskedBy returns the private address from which all clients seem to come, although the
// relay has a public one, and how many clients there are. If there is such an address,
// something in front of the relay hides where clients are. Else it is the zero Addr.
func (r *relay) maskedBy() (mask netip.Addr, clients int) {
	var from []netip.Addr
	for _, id := range r.host.Network().Peers() {
		conns := r.host.Network().ConnsToPeer(id)
		if r.federation.get(id) == nil && len(conns) > 0 {
			from = append(from, ipOf(conns[0].RemoteMultiaddr()))
		}
	}
	public := func(a ma.Multiaddr) bool { return isDNS(a) || manet.IsPublicAddr(a) }
	if !slices.ContainsFunc(r.reach.now(), public) {
		return netip.Addr{}, len(from)
	}
	return maskOf(from), len(from)
}

// counters returns all counts at this moment.
func (r *relay) counters() counters {
	c := counters{
		peersServed:  r.peers.served.count(),
		bridged:      int(r.tally.bridged.Load()),
		bridgedBytes: r.tally.bridgedBytes.Load(),
		bridges:      r.tally.bridges.Load(),
		clients:      len(r.host.Network().Peers()),
		maxClients:   r.limits.clients,
		reservations: r.tally.reservations.Load(),
	}
	r.host.Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
		c.connections = s.Stat().NumConnsInbound
		return nil
	})
	c.relayedBytes = r.tally.relayedBytes.Load() + c.bridgedBytes
	c.relayedConnections, c.circuits = r.circuits.counts()
	c.relayedConnections += c.bridged
	c.records, c.recordBytes = r.records.held()
	c.relays, c.relaysConnected = r.federation.counts()
	for i := range c.requests {
		c.requests[i] = r.tally.requests[i].Load()
	}
	for i := range c.refused {
		c.refused[i] = r.tally.refused[i].Load()
	}
	return c
}

// takeLocks takes each lock that serving a client needs, and lets it go: those of the
// connections, their addresses, the bridge and the circuits. It hangs if one of them does.
func (r *relay) takeLocks() {
	r.host.Network().Conns()
	r.bridge.lock()
	r.bridge.unlock()
	r.counters()
	r.peers.mu.Lock()
	defer r.peers.mu.Unlock()
}

// drain refuses new reservations, circuits and bridges and waits until the open
// circuits have ended, for at most timeout. It returns how many are left.
func (r *relay) drain(ctx context.Context, timeout time.Duration) int {
	r.bridge.drain()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return r.circuits.drain(ctx)
}

// close ends everything that was started, in reverse order. startRelay also calls it on a
// relay that has started in part. It takes as long as libp2p takes.
func (r *relay) close() error {
	r.federation.close()
	r.names.close()
	r.reach.close()
	var errs []error
	if r.service != nil {
		errs = append(errs, r.service.Close())
	}
	r.bridge.close()
	r.peers.close()
	if r.dht != nil {
		errs = append(errs, r.dht.Close())
	}
	if r.host != nil {
		errs = append(errs, r.host.Close())
	}
	errs = append(errs, r.sockets.close())
	return errors.Join(errs...)
}
