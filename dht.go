package main

// One DHT request's whole way, from the stream that it comes on to the answer. The
// engine is kad-dht; what is here bounds what it reads and amends what it writes.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protowire"
)

// publisherOf is who put the record, as it says, or "". As everywhere in
// protobuf, the last of several is meant.
func publisherOf(rec *recpb.Record) (publisher peer.ID) {
	for unknown := rec.ProtoReflect().GetUnknown(); len(unknown) > 0; {
		num, typ, tag := protowire.ConsumeTag(unknown)
		if tag < 0 {
			return ""
		}
		n := protowire.ConsumeFieldValue(num, typ, unknown[tag:])
		if n < 0 {
			return ""
		}
		if num == publisherField && typ == protowire.BytesType {
			id, _ := protowire.ConsumeBytes(unknown[tag:])
			publisher = peer.ID(id)
		}
		unknown = unknown[tag+n:]
	}
	return publisher
}

// kadHost is the host that kad-dht is given: it bounds the requests on the
// streams that kad-dht handles, and amends the answers.
type kadHost struct {
	host.Host
	answers *answers
	tally   *tally
}

func (h kadHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) {
		handle(&kadStream{boundedStream: boundedStream{Stream: s, tally: h.tally}, answers: h.answers})
	})
}

// kadStream is one on which kad-dht reads requests and writes an answer to each.
type kadStream struct {
	boundedStream
	answers *answers

	// request is the one being handled; kad-dht's request hook sets it.
	request *kadpb.Message

	// answer is what was written of the answer to it.
	answer []byte
}

// Write gathers an answer, which kad-dht writes as a varint length and as many
// bytes (kad-dht spec, RPC messages), in pieces, and sends it amended.
func (s *kadStream) Write(p []byte) (int, error) {
	s.answer = append(s.answer, p...)
	length, n := binary.Uvarint(s.answer)
	if n <= 0 || uint64(len(s.answer)-n) < length {
		return len(p), nil // not yet whole
	}
	amended, err := s.answers.amend(s.Conn(), s.request, s.answer[n:])
	if err != nil {
		return 0, err
	}
	frame := append(binary.AppendUvarint(nil, uint64(len(amended))), amended...)
	s.answer, s.request = nil, nil // a stream may idle for a minute
	if _, err := s.Stream.Write(frame); err != nil {
		return 0, err
	}
	return len(p), nil
}

// recordValidator accepts any value under recordPrefix within the bounds. What
// a value says is the clients' business.
type recordValidator struct{}

func (recordValidator) Validate(key string, value []byte) error {
	switch {
	case !strings.HasPrefix(key, recordPrefix) || len(key) == len(recordPrefix):
		return errors.New("key is not under " + recordPrefix)
	case len(key) > maxRecordKey:
		return fmt.Errorf("key of %d bytes is above %d", len(key), maxRecordKey)
	case len(value) == 0:
		return errors.New("value is empty")
	case len(value) > maxRecordValue:
		return fmt.Errorf("value of %d bytes is above %d", len(value), maxRecordValue)
	}
	return nil
}

// Select prefers values[0], which is the one arriving: all devices of a group
// share one key, and the last to write it must be the one found. A timestamp
// inside is no guide, because a device with a slow clock would never be.
func (recordValidator) Select(string, [][]byte) (int, error) { return 0, nil }

// boundRequest is kad-dht's hook before it handles a request. It leaves of a
// record what clients use, so that nothing else is stored or sent on, and takes
// the record away, which makes the handler refuse the request, if that is too
// much.
func boundRequest(req *kadpb.Message) {
	rec := req.GetRecord()
	if rec == nil {
		return
	}
	extra, err := knownExtra(rec.ProtoReflect().GetUnknown())
	if err != nil || len(extra) > maxRecordExtra {
		req.Record = nil
		return
	}
	rec.ProtoReflect().SetUnknown(extra)
}

// knownExtra returns the publisher and ttl fields in unknown, byte for byte.
func knownExtra(unknown []byte) ([]byte, error) {
	var extra []byte
	for len(unknown) > 0 {
		num, typ, n := protowire.ConsumeField(unknown)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if num == publisherField && typ == protowire.BytesType || num == ttlField && typ == protowire.VarintType {
			extra = append(extra, unknown[:n]...)
		}
		unknown = unknown[n:]
	}
	return extra, nil
}

var errKadMessageTooLong = fmt.Errorf("DHT message is above %d bytes", maxKadMessage)

// boundedStream follows the frames that are read from it, each a varint length
// and as many bytes (kad-dht spec, RPC messages), and fails at a length above
// maxKadMessage: before the last byte of that length is handed out, so that the
// reader cannot yet allocate for it. It has one reader.
type boundedStream struct {
	network.Stream
	tally  *tally
	body   uint64 // bytes left of the current frame
	header []byte // of the next frame, while incomplete
}

func (s *boundedStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if skip := min(s.body, uint64(len(rest))); skip > 0 {
			s.body -= skip
			rest = rest[skip:]
			continue
		}
		s.header = append(s.header, rest[0])
		rest = rest[1:]
		length, size := binary.Uvarint(s.header)
		switch {
		case size == 0 && len(s.header) < binary.MaxVarintLen64: // needs more
			continue
		case size <= 0 || length > maxKadMessage:
			s.tally.refuse(refusedMessage)
			return 0, errKadMessageTooLong
		}
		s.body, s.header = length, s.header[:0]
	}
	return n, err
}

// newDHT serves DHT requests and makes none.
func (r *relay) newDHT() (*dht.IpfsDHT, error) {
	r.records = newRecordStore(r.limits.records())
	return dht.New(kadHost{r.host, r.answers, &r.tally},
		dht.Mode(dht.ModeServer),
		// On the prefix /ipfs kad-dht insists on IPFS's two validators, so it
		// gets another one, and the protocol by itself.
		dht.ProtocolPrefix("/privstack"),
		dht.V1ProtocolOverride(kadProtocol),
		dht.Validator(recordValidator{}),
		dht.Datastore(r.records),
		dht.MaxRecordAge(maxRecordAge),
		dht.ValueGCInterval(0), // recordStore drops by itself what is too old
		dht.DisableProviders(), // unbounded, and clients have none
		// Nobody has a place in the routing table, for answers takes none from it: no
		// lookup checks, and no refreshing, which would dial what clients name.
		dht.LookupCheckConcurrency(0),
		dht.DisableAutoRefresh(),
		dht.OnRequestHook(func(_ context.Context, s network.Stream, req *kadpb.Message) {
			boundRequest(req)
			r.tally.dhtRequest(req)
			r.records.from(s.Conn(), req)
			r.groups.note(s.Conn().RemotePeer(), req)
			if !r.peers.connected(s.Conn().RemotePeer()) {
				r.groups.leave(s.Conn().RemotePeer()) // it has, meanwhile
			}
			s.(*kadStream).request = req
		}),
	)
}
