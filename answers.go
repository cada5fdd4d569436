package main

// Whom a DHT answer names. A client can dial only those that an answer names while
// its query runs, and a query ends only when all that were named have answered or
// failed. So this decides how fast devices meet.

import (
	"slices"
	"strings"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kb "github.com/libp2p/go-libp2p-kbucket"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// answers decides whom an answer names.
type answers struct {
	peers      *peers
	federation *federation
}

// choose returns the peers that the answer to req names, where rec is the record
// that the answer holds:
//
//   - the peer that FIND_NODE asks for, with all its addresses, even if it is no
//     DHT peer;
//   - the publisher of the record, however far from the key: it is the mate that
//     the asker looks for, and its addresses are known from nowhere else. A record
//     may claim any publisher, so we give the address from which that peer
//     authenticated here, or none;
//   - the other relays, so that the asker looks and publishes there, too;
//   - in a small network everybody, so that dials can cross;
//   - in a larger one no strangers, whether they can be dialled or not.
//
// Clients of other relays get the addresses that their relays give.
//
// Strangers do harm. A query waits 5 s for each that cannot be reached, three at
// a time. Each that can be enters the client's own table, and answers with
// others; and as soon as a client knows twenty, its queries begin and end with the
// twenty closest of them, and this relay is not asked any more. Measured with
// rust-libp2p among 1 000 strangers, half of them open: when answers were filled
// with open ones, 3 of 5 pairs met that could; with none, all.
func (a *answers) choose(asker peer.ID, req *kadpb.Message, rec *recpb.Record) []peer.AddrInfo {
	chosen := make([]peer.AddrInfo, 0, maxNamed)
	name := func(id peer.ID, addrs []ma.Multiaddr) {
		// A peer that has left has no address.
		if len(addrs) > 0 && len(chosen) < maxNamed && !slices.ContainsFunc(chosen, func(i peer.AddrInfo) bool { return i.ID == id }) {
			chosen = append(chosen, peer.AddrInfo{ID: id, Addrs: addrs})
		}
	}
	beforePut := false
	if req.GetType() == kadpb.Message_FIND_NODE {
		// The walk before a PUT has a record's key. It waits for all peers that
		// are named, up to 60 s and then in vain.
		beforePut = strings.HasPrefix(string(req.Key), recordPrefix)
		target := peer.ID(req.Key)
		if a.federation.members[target] == nil {
			name(target, a.peers.network.Peerstore().Addrs(target))
		}
		if len(chosen) == 0 && !beforePut {
			name(target, a.elsewhere(asker, target))
		}
	}
	// checkRecord has let the record in, so its fields can be read.
	if extras, _ := readExtras(rec); extras.publisher != asker && extras.publisher != "" {
		publisher := extras.publisher
		name(publisher, a.addrs(publisher, asker))
		if len(chosen) == 0 {
			seen := a.elsewhere(asker, publisher)
			name(publisher, seen[:min(len(seen), 1)])
		}
	}
	for id := range a.federation.members {
		if id != asker {
			name(id, a.addrs(id, asker))
		}
	}
	if !beforePut && a.peers.table.Size() <= maxNamed {
		for _, id := range a.peers.table.NearestPeers(kb.ConvertKey(string(req.Key)), maxNamed) {
			if id != asker {
				name(id, a.addrs(id, asker))
			}
		}
	}
	return chosen
}

// addrs returns the addresses that we give asker of id, for which it did not ask.
func (a *answers) addrs(id, asker peer.ID) []ma.Multiaddr {
	if named := a.federation.addrs(id); len(named) > 0 && a.peers.connected(id) {
		return fitAddrs(a.peers.observed(id), named)
	}
	return a.peers.unasked(id, asker)
}

// elsewhere returns the addresses that other relays give of a peer that is not here.
// If asker is a relay, we do not ask: the question might go round in circles.
func (a *answers) elsewhere(asker, id peer.ID) []ma.Multiaddr {
	if said, err := a.peers.network.Peerstore().Get(asker, "ProtocolVersion"); err == nil && said == protocolVersion {
		return nil
	}
	return a.federation.find(id)
}
