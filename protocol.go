package main

// Names on the wire: protocols, the DHT's keys and record fields, and the identity
// endpoint's answer. The deployed clients rely on each of them.

import (
	"time"

	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// protocolVersion is what identify and the identity endpoint say.
	protocolVersion = "/privstack/relay/1.0.0"

	// kadProtocol is rust-libp2p's default DHT protocol, kad::PROTOCOL_NAME. The
	// clients kept that name, but their network is their own: nothing connects it
	// to the nodes of IPFS.
	kadProtocol protocol.ID = "/ipfs/kad/1.0.0"

	// vouchProtocol asks a relay for the other relays that its operator named. The
	// answer is their addresses, one a line as --bootstrap takes them, and then the
	// end of the stream. The relay reads no question.
	vouchProtocol protocol.ID = "/privstack/relay/vouched/1.0.0"

	// recordPrefix begins every key that the relay stores.
	recordPrefix = "/privstack/"

	// identityRoute is the path of the identity endpoint. The deployed clients
	// ask for exactly this one.
	identityRoute = "/api/v1/identity"
)

// maxSyncMessage is the size of the largest message that the clients send each other, in
// bytes: the limit of their request-response protocol.
const maxSyncMessage = 16 << 20

// identityResponse is the body of GET /api/v1/identity. Field names and their
// order are the old relay's, on which deployed clients rely.
type identityResponse struct {
	PeerID string `json:"peer_id"`

	// Addresses are multiaddrs without /p2p: announced ones first, then the
	// sockets. In the sockets' addresses clients replace 0.0.0.0 and :: with the
	// host that they asked.
	Addresses       []string `json:"addresses"`
	ProtocolVersion string   `json:"protocol_version"`
	AgentVersion    string   `json:"agent_version"`
}

// recordExtras are the fields that rust-libp2p adds to the record of the kad-dht
// spec. Its clients ignore a record without a publisher. Go's record type knows
// neither field, so they travel as unknown ones.
// https://github.com/libp2p/rust-libp2p/blob/master/protocols/kad/src/generated/dht.proto
type recordExtras struct {
	publisher peer.ID       // of the device that put it, as it says; "" if it does not
	ttl       time.Duration // how long the device wants it kept; 0 if it does not say
	encoded   []byte        // both fields, byte for byte as they came
}

const (
	publisherField protowire.Number = 666 // bytes
	ttlField       protowire.Number = 777 // varint of 32 bits: seconds left to live
)

// readExtras returns the two fields of rec, or an error if its unknown fields are not
// valid protobuf. Of several publishers the last one counts, as always in protobuf.
func readExtras(rec *recpb.Record) (recordExtras, error) {
	var x recordExtras
	for unknown := rec.ProtoReflect().GetUnknown(); len(unknown) > 0; {
		num, typ, n := protowire.ConsumeField(unknown)
		if n < 0 {
			return recordExtras{}, protowire.ParseError(n)
		}
		switch {
		case num == publisherField && typ == protowire.BytesType:
			_, _, tag := protowire.ConsumeTag(unknown)
			id, _ := protowire.ConsumeBytes(unknown[tag:])
			x.publisher = peer.ID(id)
			x.encoded = append(x.encoded, unknown[:n]...)
		case num == ttlField && typ == protowire.VarintType:
			_, _, tag := protowire.ConsumeTag(unknown)
			seconds, _ := protowire.ConsumeVarint(unknown[tag:])
			x.ttl = time.Duration(uint32(seconds)) * time.Second
			x.encoded = append(x.encoded, unknown[:n]...)
		}
		unknown = unknown[n:]
	}
	return x, nil
}

// encodeExtras returns the fields that a device sends with a record.
func encodeExtras(publisher peer.ID, ttlSeconds uint64) []byte {
	encoded := protowire.AppendTag(nil, publisherField, protowire.BytesType)
	encoded = protowire.AppendBytes(encoded, []byte(publisher))
	encoded = protowire.AppendTag(encoded, ttlField, protowire.VarintType)
	return protowire.AppendVarint(encoded, ttlSeconds)
}
