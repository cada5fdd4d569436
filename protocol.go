package main

// What stands on the wire: names of protocols, fields and keys, and the answer of
// the identity endpoint. The deployed clients and `check` rely on each of them.

import (
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protowire"
)

// identityPath is fixed in the deployed clients.
const identityPath = "/api/v1/identity"

// identityResponse is the body of GET /api/v1/identity. Field names and their
// order are the old relay's, on which deployed clients rely.
type identityResponse struct {
	PeerID string `json:"peer_id"`

	// Addresses are multiaddrs without /p2p: announced ones first, then the
	// sockets, which clients complete with the host they asked.
	Addresses       []string `json:"addresses"`
	ProtocolVersion string   `json:"protocol_version"`
	AgentVersion    string   `json:"agent_version"`
}

// recordPrefix begins every key that is stored.
const recordPrefix = "/privstack/"

// rust-libp2p adds two fields to the record of the kad-dht spec, and its clients
// ignore a record without the first. Go's record type knows neither, so they
// travel as unknown fields.
// https://github.com/libp2p/rust-libp2p/blob/master/protocols/kad/src/generated/dht.proto
const (
	publisherField protowire.Number = 666 // bytes: the peer ID of who put it
	ttlField       protowire.Number = 777 // varint: seconds left to live

	// maxRecordExtra bounds both together, in bytes; a peer ID has at most 42.
	maxRecordExtra = 128
)

const (
	// protocolVersion is what identify and the identity endpoint say.
	protocolVersion = "/privstack/relay/1.0.0"

	// kadProtocol is rust-libp2p's default DHT protocol, kad::PROTOCOL_NAME,
	// which the clients left as it was: theirs is a network of its own
	// nonetheless, because nothing ties it to IPFS's nodes.
	kadProtocol protocol.ID = "/ipfs/kad/1.0.0"
)
