package main

// What the bridge reads of a packet: the properties that all versions of QUIC share
// (RFC 8999), the connection IDs that the relay gives out for its own connections,
// and the connection IDs that tie a packet to a flow.

import (
	"crypto/rand"
	"encoding/binary"
	"hash/maphash"
	"math/bits"

	"github.com/quic-go/quic-go"
)

// relayIDLength sets the length of the connection IDs that the relay gives out for
// its own connections, in bytes. One half of each ID is random. The other half is a
// keyed hash of the first, by which the relay recognises the ID.
const relayIDLength = 8

// verdict says what becomes of a datagram.
type verdict int

const (
	toRelay verdict = iota
	toNobody
	toMate
	unsure // decide has to look, with both locks
)

// GenerateConnectionID returns a new connection ID of the relay's own. With
// ConnectionIDLen it makes b the quic.ConnectionIDGenerator of quic-go's Transport.
func (b *bridge) GenerateConnectionID() (quic.ConnectionID, error) {
	var id [relayIDLength]byte
	rand.Read(id[:relayIDLength/2])
	binary.LittleEndian.PutUint32(id[relayIDLength/2:], b.mark(id[:relayIDLength/2]))
	return quic.ConnectionIDFromBytes(id[:]), nil
}

func (*bridge) ConnectionIDLen() int { return relayIDLength }

func (b *bridge) mark(random []byte) uint32 { return uint32(maphash.Bytes(b.seed, random)) }

// isOurs reports whether id begins with a connection ID that this relay gave out.
func (b *bridge) isOurs(id []byte) bool {
	return len(id) >= relayIDLength && binary.LittleEndian.Uint32(id[relayIDLength/2:]) == b.mark(id[:relayIDLength/2])
}

// key identifies an ID in packets that come from e.
func (e *end) key(id []byte) uint64 { return maphash.Bytes(e.side.bridge.seed, id) ^ e.salt }

// hop says where a datagram goes.
type hop struct {
	verdict verdict
	legs    [2]*leg // the legs it goes by; of two, only one is right, and nobody can tell which yet
	known   bool    // its ID belongs to the leg
}

// find returns the leg to which a packet from e with a short header belongs, and the
// connection ID in that header. If IDs of several lengths match, the longest wins.
func (e *end) find(d []byte) (*leg, []byte) {
	for left := e.lengths; left != 0; {
		n := bits.Len32(left) - 1
		left &^= 1 << n
		if len(d) > n {
			if l := e.side.legs[e.key(d[1:1+n])]; l != nil {
				return l, d[1 : 1+n]
			}
		}
	}
	return nil, nil
}

// isLong reports whether d has a long header (RFC 8999, 5.1).
func isLong(d []byte) bool { return d[0]&0x80 != 0 }

// longIDs reads the connection IDs of a long header (RFC 8999, 5.1).
func longIDs(d []byte) (dest, source []byte, ok bool) {
	const before = 1 + 4 // first byte, version
	if len(d) < before+1 {
		return nil, nil, false
	}
	n := int(d[before])
	if n > maxID || len(d) < before+1+n+1 {
		return nil, nil, false
	}
	rest := d[before+1:]
	dest, rest = rest[:n], rest[n:]
	n = int(rest[0])
	if n > maxID || len(rest) < 1+n {
		return nil, nil, false
	}
	return dest, rest[1 : 1+n], true
}

// isInitial reports whether d begins a connection of QUIC version 1 (RFC 9000, 14.1
// and 17.2.2). d has a long header, and dest is the destination ID in it.
func isInitial(d, dest []byte) bool {
	return binary.BigEndian.Uint32(d[1:]) == 1 && d[0]&0x30 == 0 && len(d) >= 1200 && len(dest) >= 8
}

// learn notes that packets which come by l carry id. short says that id may begin a
// short header.
func (l *leg) learn(id []byte, short bool) {
	n, e := len(id), l.end
	if n < minID || n > maxID || e.side.bridge.isOurs(id) {
		return
	}
	key := e.key(id)
	if e.side.legs[key] != nil {
		return // the first leg keeps it
	}
	at := l.idCount % legIDs
	if l.idCount >= legIDs {
		delete(e.side.legs, l.ids[at])
		e.last = nil
	}
	l.ids[at] = key
	l.idCount++
	e.side.legs[key] = l
	if short {
		l.idLength = uint8(n)
		e.lengths |= 1 << n
	}
}
